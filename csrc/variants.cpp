#include "variants.h"

#include <cstdlib>
#include <cstring>

#include "attention.h"

namespace fastgan {
namespace plain {
extern const AttentionKernels attention[4];
}
#ifdef FASTGAN_X86_VARIANTS
namespace avx2 {
extern const AttentionKernels attention[4];
}
namespace avx512 {
extern const AttentionKernels attention[4];
}
#endif

namespace {

int64_t widest() {
#ifdef FASTGAN_X86_VARIANTS
  __builtin_cpu_init();
  const char* allowed = std::getenv("ATEN_CPU_CAPABILITY");
  const bool plain_only = allowed && !std::strcmp(allowed, "default");
  const bool no_avx512 = allowed && !std::strcmp(allowed, "avx2");
  if (plain_only || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2"))
    return 128;
  if (no_avx512 || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return 256;
  return 512;
#else
  return 128;
#endif
}

}  // namespace

int64_t vector_bits() {
  static const int64_t bits = widest();
  return bits;
}

const AttentionKernels& attention_kernels(Element element) {
#ifdef FASTGAN_X86_VARIANTS
  const auto* table = vector_bits() == 512 ? avx512::attention
                      : vector_bits() == 256 ? avx2::attention
                                             : plain::attention;
#else
  const auto* table = plain::attention;
#endif
  return table[int(element)];
}

}  // namespace fastgan
