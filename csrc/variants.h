// Instruction sets that the CPU kernels are compiled for, and the choice between them. No torch here.
#pragma once

#include <cstdint>

namespace fastgan {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// In the order of the tables of kernels below.
enum class Element { kFloat, kDouble, kBFloat16, kHalf };

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTGAN_X86_VARIANTS 1
#endif

// Vector width in bits of the variant in use: the widest that the processor has and ATEN_CPU_CAPABILITY ("default",
// "avx2" or "avx512") allows, as in torch. 128 means plain C++.
int64_t vector_bits();


}  // namespace fastgan
