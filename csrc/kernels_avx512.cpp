// The CPU kernels for x86-64-v4; elsewhere this file is empty.
#include "definite_trace.h"
#include "projections.h"
#include "spectral_norm.h"

#ifdef FASTGAN_X86_VARIANTS
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif
#define FASTGAN_VARIANT avx512
#define FASTGAN_VECTOR_BYTES 64
#define FASTGAN_BLOCK_ROWS 8
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
