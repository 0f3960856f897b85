#include "variants.h"

#include <cstdlib>
#include <cstring>

#include "definite_trace.h"
#include "projections.h"
#include "spectral_norm.h"

namespace fastgan {
namespace plain {
extern const AttentionKernels attention[4];
extern const ProjectionKernels projections[4];
extern const SpectralNormKernels spectral_norms[2];
extern const DefiniteTraceKernels definite_traces[2];
}
#ifdef FASTGAN_X86_VARIANTS
namespace avx2 {
extern const AttentionKernels attention[4];
extern const ProjectionKernels projections[4];
extern const SpectralNormKernels spectral_norms[2];
extern const DefiniteTraceKernels definite_traces[2];
}
namespace avx512 {
extern const AttentionKernels attention[4];
extern const ProjectionKernels projections[4];
extern const SpectralNormKernels spectral_norms[2];
extern const DefiniteTraceKernels definite_traces[2];
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

#ifdef FASTGAN_X86_VARIANTS
#define FASTGAN_CHOSEN(table) \
  (vector_bits() == 512 ? avx512::table : vector_bits() == 256 ? avx2::table : plain::table)
#else
#define FASTGAN_CHOSEN(table) plain::table
#endif

const AttentionKernels& attention_kernels(Element element) { return FASTGAN_CHOSEN(attention)[int(element)]; }
const ProjectionKernels& projection_kernels(Element element) { return FASTGAN_CHOSEN(projections)[int(element)]; }
const SpectralNormKernels& spectral_norm_kernels(bool is_double) { return FASTGAN_CHOSEN(spectral_norms)[is_double]; }
const DefiniteTraceKernels& definite_trace_kernels(bool is_double) { return FASTGAN_CHOSEN(definite_traces)[is_double]; }

}  // namespace fastgan
