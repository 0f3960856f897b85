// The kernels of one instruction set. A file that includes this has set the target and defined FASTGAN_VARIANT,
// FASTGAN_VECTOR_BYTES and FASTGAN_BLOCK_ROWS, and has included definite_trace.h,
// projections.h and spectral_norm.h.
#define FASTGAN_INLINE inline __attribute__((always_inline))

namespace fastgan {
namespace FASTGAN_VARIANT {
namespace {

constexpr int64_t kVectorBytes = FASTGAN_VECTOR_BYTES;
constexpr int64_t kRows = FASTGAN_BLOCK_ROWS;  // the sums of these rows, two vectors each, are in registers
constexpr int64_t kLeastRows = 4;

#include "simd.h"

#include "attention_kernels.h"

#include "projections_kernels.h"

#include "spectral_norm_kernels.h"

#include "definite_trace_kernels.h"

}  // namespace

extern const AttentionKernels attention[4] = {attention_table<float>(), attention_table<double>(),
                                              attention_table<BFloat16>(), attention_table<Half>()};

extern const ProjectionKernels projections[4] = {projection_table<float>(), projection_table<double>(),
                                                projection_table<BFloat16>(), projection_table<Half>()};

extern const SpectralNormKernels spectral_norms[2] = {spectral_norm_table<float>(), spectral_norm_table<double>()};

extern const DefiniteTraceKernels definite_traces[2] = {definite_trace_table<float>(), definite_trace_table<double>()};

}  // namespace FASTGAN_VARIANT
}  // namespace fastgan
