// Operators for CUDA tensors: the Device of iteration.h, with cuBLAS's strided-batched products and one kernel each for
// `map` and `sum`, and small_trace with one block per pair of matrices.
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "nuclear_norm.h"
#include "small_trace.h"
#include "sqrtm.h"

namespace fastgan {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 1024;  // per matrix; each thread takes every (blocks * kThreads)-th entry
constexpr int64_t kMaxGridY = 65535;

void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(code));
}

void check(cublasStatus_t code) {
  if (code == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string("cuBLAS error: ") + cublasGetStatusString(code));
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// torch's cuBLAS handle for the current device, set to its current stream and workspace.
cublasHandle_t current_blas() {
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  return static_cast<cublasHandle_t>(handle);
}

// Block (x, y) serves matrices y, y + gridDim.y, ...
template <class F>
__global__ void map_kernel(int64_t count, int64_t size, F f) {
  for (int64_t i = blockIdx.y; i < count; i += gridDim.y)
    for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < size; k += int64_t(gridDim.x) * kThreads)
      f(i, k);
}

__device__ double warp_sum(double x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over a block's threads, returned to its first thread.
__device__ double block_sum(double x) {
  __shared__ double warps[kThreads / kWarp];
  x = warp_sum(x);
  __syncthreads();  // until the last call's sums have been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w];
  return total;
}

// out[i * gridDim.x + block] = this block's share of the sum of f(i, k) over k.
template <class F>
__global__ void sum_kernel(int64_t count, int64_t size, F f, double* __restrict__ out) {
  for (int64_t i = blockIdx.y; i < count; i += gridDim.y) {
    double x = 0;
    for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < size; k += int64_t(gridDim.x) * kThreads)
      x += f(i, k);
    x = block_sum(x);
    if (threadIdx.x == 0) out[i * gridDim.x + blockIdx.x] = x;
  }
}

struct Identically {
  const double* a;
  int64_t size;
  __device__ double operator()(int64_t i, int64_t k) const { return a[i * size + k]; }
};

// x = high + low, exactly; `high` is a TF32 number, with 10 bits of mantissa.
struct SplitTf32 {
  const float* x;
  float* high;
  float* low;
  int64_t size;
  __device__ void operator()(int64_t i, int64_t k) const {
    const float value = x[i * size + k];
    const float truncated = __uint_as_float(__float_as_uint(value) & 0xffffe000u);
    high[i * size + k] = truncated;
    low[i * size + k] = value - truncated;
  }
};

template <typename T>
struct [[gnu::visibility("hidden")]] TensorMatrix {
  T* data;
  int64_t count, rows, cols;
  Tensor tensor;  // (count, rows, cols), contiguous
};

template <typename T>
TensorMatrix<T> as_matrix(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.size(2), tensor};
}

class CudaDevice {
 public:
  template <typename T>
  using Matrix = TensorMatrix<T>;

  explicit CudaDevice(const Tensor& like)
      : guard_(like.get_device_index()), like_(like), stream_(current_stream(like)), blas_(current_blas()) {}

  template <typename T>
  Matrix<T> empty(int64_t count, int64_t rows, int64_t cols) {
    const auto type = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
    return as_matrix<T>(torch::stable::new_empty(like_, {count, rows, cols}, type));
  }

  void multiply(const Matrix<double>& a, const Matrix<double>& b, bool transpose_b, Matrix<double>& out) {
    const double one = 1, zero = 0;
    gemm(a, b, transpose_b, out, CUDA_R_64F, CUBLAS_COMPUTE_64F, &one, &zero);
  }

  // float32 from three products of TF32 parts; the omitted product, low times low, is below 2^-21 of the result.
  void multiply(const Matrix<float>& a, const Matrix<float>& b, bool transpose_b, Matrix<float>& out) {
    const auto [a_high, a_low] = split(a);
    const auto [b_high, b_low] = split(b);
    const float one = 1, zero = 0;
    const auto compute = CUBLAS_COMPUTE_32F_FAST_TF32;
    gemm(a_low, b_high, transpose_b, out, CUDA_R_32F, compute, &one, &zero);
    gemm(a_high, b_low, transpose_b, out, CUDA_R_32F, compute, &one, &one);
    gemm(a_high, b_high, transpose_b, out, CUDA_R_32F, compute, &one, &one);
  }

  template <class F>
  void map(int64_t count, int64_t size, const F& f) {
    if (count == 0 || size == 0) return;
    map_kernel<<<grid(count, size), kThreads, 0, stream_>>>(count, size, f);
    check(cudaGetLastError());
  }

  template <class F>
  void sum(int64_t count, int64_t size, const F& f, double* out) {
    if (count == 0) return;
    const dim3 blocks = grid(count, size);
    const auto partial = empty<double>(1, count, blocks.x);
    sum_kernel<<<blocks, kThreads, 0, stream_>>>(count, size, f, partial.data);
    check(cudaGetLastError());
    const Identically term{partial.data, blocks.x};
    sum_kernel<<<dim3(1, blocks.y), kThreads, 0, stream_>>>(count, blocks.x, term, out);
    check(cudaGetLastError());
  }

  // Waits for the stream, once per pass. Returns false within a graph, which must not wait; matrices that are done stay
  // as they are.
  bool finished(const double* flags, int64_t count) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &capture));
    if (capture != cudaStreamCaptureStatusNone) return false;
    std::vector<double> host(count);
    check(cudaMemcpyAsync(host.data(), flags, count * sizeof(double), cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
    return std::all_of(host.begin(), host.end(), [](double flag) { return flag != 0; });
  }

 private:
  dim3 grid(int64_t count, int64_t size) const {
    const int64_t blocks = std::max<int64_t>(1, std::min(kMaxBlocks, (size + kThreads - 1) / kThreads));
    return dim3(unsigned(blocks), unsigned(std::min(count, kMaxGridY)));
  }

  std::pair<Matrix<float>, Matrix<float>> split(const Matrix<float>& x) {
    const auto high = empty<float>(x.count, x.rows, x.cols), low = empty<float>(x.count, x.rows, x.cols);
    const int64_t size = x.rows * x.cols;
    map(x.count, size, SplitTf32{x.data, high.data, low.data, size});
    return {high, low};
  }

  // To column-major cuBLAS, row-major out = a b is out^T = b^T a^T: the operands swap, the transposes stay.
  template <typename T>
  void gemm(const Matrix<T>& a, const Matrix<T>& b, bool transpose_b, Matrix<T>& out, cudaDataType type,
            cublasComputeType_t compute, const T* alpha, const T* beta) {
    if (out.count == 0 || out.rows == 0 || out.cols == 0) return;
    check(cublasGemmStridedBatchedEx(
        blas_, transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, int(out.cols), int(out.rows), int(a.cols), alpha,
        b.data, type, int(b.cols), b.rows * b.cols, a.data, type, int(a.cols), a.rows * a.cols, beta, out.data, type,
        int(out.cols), out.rows * out.cols, int(out.count), compute, CUBLAS_GEMM_DEFAULT));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  Tensor like_;
  cudaStream_t stream_;
  cublasHandle_t blas_;
};

// Returns polar factors and reports (n, 3), rows of value, error estimate and iterations, for float64 m (n, rows,
// cols), rows <= cols.
std::tuple<Tensor, Tensor> nuclear_norm(const Tensor& m, bool low_precision, double tolerance) {
  const Tensor dense = torch::stable::contiguous(m);
  CudaDevice device(dense);
  auto matrices = as_matrix<double>(dense);
  auto factors = device.empty<double>(matrices.count, matrices.rows, matrices.cols);
  auto report = device.empty<double>(1, matrices.count, kReportColumns);
  PolarIteration<CudaDevice>(device, matrices, factors, report, tolerance).run(low_precision);
  return {factors.tensor, torch::stable::select(report.tensor, 0, 0)};
}

// Returns A^{1/2} or A^{-1/2} for float64 a (n, d, d).
Tensor sqrtm(const Tensor& a, bool inverse) {
  const Tensor dense = torch::stable::contiguous(a);
  CudaDevice device(dense);
  auto matrices = as_matrix<double>(dense);
  auto root = device.empty<double>(matrices.count, matrices.rows, matrices.rows);
  coupled_newton_schulz(device, matrices, root, inverse);
  return root.tensor;
}

struct ThreadBlock {
  __device__ int worker() const { return int(threadIdx.x) / kWarp; }
  __device__ int workers() const { return kThreads / kWarp; }
  __device__ int lane() const { return int(threadIdx.x) % kWarp; }
  __device__ int lanes() const { return kWarp; }
  __device__ double sum(double x) const { return warp_sum(x); }
  __device__ void sync() const { __syncthreads(); }
};

// One pair of matrices per block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    small_trace_kernel(const T* __restrict__ a, const T* __restrict__ b, const int64_t* __restrict__ pairs, int d,
                       double* __restrict__ out) {
  extern __shared__ double workspace[];
  const int64_t n = blockIdx.x, size = int64_t(d) * d;
  ThreadBlock group;
  SmallTrace<ThreadBlock, T>(group, d, workspace).run(a + pairs[2 * n] * size, b + pairs[2 * n + 1] * size, out + 3 * n);
}

template <typename T>
void launch_small_trace(const Tensor& a, const Tensor& b, const Tensor& pairs, double* out) {
  const int d = int(a.size(1));
  const int bytes = int(small_workspace(d) * sizeof(double));
  check(cudaFuncSetAttribute(small_trace_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  small_trace_kernel<T><<<unsigned(pairs.size(0)), kThreads, bytes, current_stream(a)>>>(
      static_cast<const T*>(a.data_ptr()), static_cast<const T*>(b.data_ptr()),
      static_cast<const int64_t*>(pairs.data_ptr()), d, out);
  check(cudaGetLastError());
}

// Like the operator on the CPU; `pairs` is on the device.
Tensor small_trace(const Tensor& a, const Tensor& b, const Tensor& pairs) {
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const Tensor dense_a = torch::stable::contiguous(a), dense_b = torch::stable::contiguous(b);
  const Tensor dense_pairs = torch::stable::contiguous(pairs);
  Tensor rows = torch::stable::new_empty(a, {pairs.size(0), 3}, ScalarType::Double);
  if (pairs.size(0) == 0) return rows;
  auto* out = static_cast<double*>(rows.data_ptr());
  if (a.scalar_type() == ScalarType::Float)
    launch_small_trace<float>(dense_a, dense_b, dense_pairs, out);
  else
    launch_small_trace<double>(dense_a, dense_b, dense_pairs, out);
  return rows;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CUDA, m) {
  m.impl("nuclear_norm", TORCH_BOX(&fastgan::nuclear_norm));
  m.impl("sqrtm", TORCH_BOX(&fastgan::sqrtm));
  m.impl("small_trace", TORCH_BOX(&fastgan::small_trace));
}
