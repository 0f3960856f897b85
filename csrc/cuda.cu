// The primitives of trace_sqrt_product on the GPU: one small kernel, cuBLAS, and torch's own eigensolvers.
#include <cmath>
#include <vector>

#include "aten.h"
#include "cuda_support.cuh"
#include "trace_sqrt_product.h"

namespace fastgan {
namespace {

using torch::headeronly::ScalarType;

constexpr int kTile = 32;
constexpr int kRows = 8;

// out = (a + a^T) / (2 scale); a block of 32 x 8 threads writes a tile of 32 x 32, transposing through shared memory.
template <typename T>
__global__ void symmetrize_kernel(const T* __restrict__ a, double* __restrict__ out, int64_t d, double scale) {
  __shared__ double mirrored[kTile][kTile + 1];  // the extra column keeps transposed reads off one bank
  const int64_t row0 = int64_t(blockIdx.y) * kTile, column0 = int64_t(blockIdx.x) * kTile;
  for (int r = threadIdx.y; r < kTile; r += kRows) {
    const int64_t i = column0 + r, j = row0 + threadIdx.x;
    if (i < d && j < d) mirrored[r][threadIdx.x] = double(a[i * d + j]) / scale;
  }
  __syncthreads();
  for (int r = threadIdx.y; r < kTile; r += kRows) {
    const int64_t i = row0 + r, j = column0 + threadIdx.x;
    if (i < d && j < d) out[i * d + j] = 0.5 * (double(a[i * d + j]) / scale + mirrored[threadIdx.x][r]);
  }
}

template <typename T>
void launch_symmetrize(const Tensor& a, double* out, double scale) {
  const int64_t d = a.size(0);
  const auto tiles = static_cast<unsigned>((d + kTile - 1) / kTile);
  const dim3 grid(tiles, tiles), block(kTile, kRows);
  symmetrize_kernel<<<grid, block, 0, current_stream(a)>>>(static_cast<const T*>(a.data_ptr()), out, d, scale);
  check(cudaGetLastError());
}

Tensor symmetrized(const Tensor& a, double scale) {
  const Tensor dense = torch::stable::contiguous(a);
  Tensor out = torch::stable::new_empty(a, {a.size(0), a.size(0)}, ScalarType::Double);
  auto* target = static_cast<double*>(out.data_ptr());
  if (a.scalar_type() == ScalarType::Float)
    launch_symmetrize<float>(dense, target, scale);
  else
    launch_symmetrize<double>(dense, target, scale);
  return out;
}

// L^T (B L) by two triangular products. cuBLAS is column-major: it sees the symmetric B as itself, and L as U = L^T.
Tensor triangular_sandwich(const Tensor& lower, const Tensor& b) {
  const Tensor l = torch::stable::contiguous(lower);
  Tensor out = torch::stable::empty_like(b);
  const cublasHandle_t blas = current_blas();
  const int n = static_cast<int>(b.size(0));
  const auto* u = static_cast<const double*>(l.data_ptr());
  auto* result = static_cast<double*>(out.data_ptr());
  const auto multiply = [&](cublasSideMode_t side, cublasOperation_t operation, const double* operand) {
    const double one = 1;
    check(cublasDtrmm(blas, side, CUBLAS_FILL_MODE_UPPER, operation, CUBLAS_DIAG_NON_UNIT, n, n, &one, u, n, operand, n,
                      result, n));
  };
  multiply(CUBLAS_SIDE_RIGHT, CUBLAS_OP_T, static_cast<const double*>(b.data_ptr()));
  multiply(CUBLAS_SIDE_LEFT, CUBLAS_OP_N, result);
  return out;
}

std::vector<double> to_host(const Tensor& vector) {
  const Tensor wide = torch::stable::contiguous(torch::stable::to(vector, ScalarType::Double));
  std::vector<double> host(wide.numel());
  const cudaStream_t stream = current_stream(wide);
  check(cudaMemcpyAsync(host.data(), wide.data_ptr(), host.size() * sizeof(double), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  return host;
}

const Primitives kPrimitives{&symmetrized, &triangular_sandwich, &to_host, nullptr, nullptr};

Tensor trace_sqrt_product_cuda(const Tensor& a, const Tensor& b, const Tensor& pairs, int64_t method) {
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  return trace_sqrt_products(kPrimitives, a, b, pairs, method);
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CUDA, m) {
  m.impl("trace_sqrt_product", TORCH_BOX(&fastgan::trace_sqrt_product_cuda));
}
