// The CPU kernels for x86-64-v3; elsewhere this file is empty.
#include "definite_trace.h"
#include "projections.h"
#include "spectral_norm.h"

#ifdef FASTGAN_X86_VARIANTS
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#define FASTGAN_VARIANT avx2
#define FASTGAN_VECTOR_BYTES 32
#define FASTGAN_BLOCK_ROWS 4
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
