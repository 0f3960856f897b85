// The kernels of one instruction set. A file that includes this has set the target and defined FASTGAN_VARIANT,
// FASTGAN_VECTOR_BYTES and FASTGAN_BLOCK_ROWS, and has included attention.h.
#define FASTGAN_INLINE inline __attribute__((always_inline))

namespace fastgan {
namespace FASTGAN_VARIANT {
namespace {

constexpr int64_t kVectorBytes = FASTGAN_VECTOR_BYTES;
constexpr int64_t kRows = FASTGAN_BLOCK_ROWS;  // whose sums of two vectors each are in registers
constexpr int64_t kLeastRows = 4;

#include "simd.h"

#include "attention_kernels.h"

}  // namespace

extern const AttentionKernels attention[4] = {attention_table<float>(), attention_table<double>(),
                                              attention_table<BFloat16>(), attention_table<Half>()};

}  // namespace FASTGAN_VARIANT
}  // namespace fastgan
