// Enough of CUDA to run the library's kernels on a CPU: a launch runs its blocks one after the other, in a shuffled
// order; the threads of a block are fibers that change at barriers and shuffles, in a shuffled order too. Each block gets
// its dynamic shared memory from malloc and poisoned static shared memory. Under ThreadSanitizer the only order between
// threads of a launch is that of __syncthreads: a missing barrier and a race between blocks are reported.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {
extern dim3 thread_index, block_index, block_dim, grid_dim;
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);
void sync_threads();
double shuffle(double x, int mask);
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);
void allow_shared(size_t bytes);
int take_error();
}  // namespace emulated

#define threadIdx (emulated::thread_index)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_dim)
#define gridDim (emulated::grid_dim)
#define __syncthreads() emulated::sync_threads()
#define __shfl_xor_sync(all, x, mask) emulated::shuffle(x, mask)

inline float __uint_as_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline uint32_t __float_as_uint(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaError_t(emulated::take_error()); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = std::getenv("FASTGAN_EMULATED_CAPTURE") ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
  if (bytes > (227 << 10)) return cudaErrorInvalidConfiguration;
  emulated::allow_shared(std::max(size_t(bytes), size_t(48 << 10)));
  return cudaSuccess;
}
namespace emulated {
struct DeviceGuard { explicit DeviceGuard(int) {} };
}
