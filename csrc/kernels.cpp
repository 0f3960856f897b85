// The CPU kernels for the compiler's baseline: plain x86-64, or NEON on aarch64.
#include "definite_trace.h"
#include "projections.h"
#include "spectral_norm.h"

#define FASTGAN_VARIANT plain
#define FASTGAN_VECTOR_BYTES 16
#ifdef __aarch64__
#define FASTGAN_BLOCK_ROWS 8
#else
#define FASTGAN_BLOCK_ROWS 4
#endif
#include "kernels.h"
