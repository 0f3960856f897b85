// cuBLAS's meaning on plain loops: column-major, leading dimensions, strides; TF32 operands cut to 10 bits, sums cut off
// (toward zero) at float32 after every 8 products, as tensor cores do.
#pragma once
#include "cuda_runtime.h"
using cublasHandle_t = void*;
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasSideMode_t { CUBLAS_SIDE_LEFT = 0, CUBLAS_SIDE_RIGHT = 1 };
enum cublasFillMode_t { CUBLAS_FILL_MODE_LOWER = 0, CUBLAS_FILL_MODE_UPPER = 1 };
enum cublasDiagType_t { CUBLAS_DIAG_NON_UNIT = 0 };
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_64F = 1 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F_FAST_TF32 = 77, CUBLAS_COMPUTE_64F = 70 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };
inline const char* cublasGetStatusString(cublasStatus_t) { return "emulated"; }
namespace emulated {
inline double operand(double x) { return x; }
inline double operand(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }
inline double summed(double sum, double part, double) { return sum + part; }
inline float summed(float sum, double part, float) {
  const double exact = double(sum) + part;
  float y = float(exact);
  if (std::abs(double(y)) > std::abs(exact)) y = std::nextafter(y, 0.0f);
  return y;
}
template <class T>
void gemm(cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb,
          T beta, T* c, int ldc) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      T sum = 0;
      for (int p0 = 0; p0 < k; p0 += 8) {
        double part = 0;
        for (int p = p0; p < std::min(k, p0 + 8); ++p) {
          const T x = ta == CUBLAS_OP_N ? a[i + int64_t(p) * lda] : a[p + int64_t(i) * lda];
          const T y = tb == CUBLAS_OP_N ? b[p + int64_t(j) * ldb] : b[j + int64_t(p) * ldb];
          part += operand(x) * operand(y);
        }
        sum = summed(sum, part, T());
      }
      T& out = c[i + int64_t(j) * ldc];
      out = alpha * sum + (beta == 0 ? T(0) : beta * out);
    }
}
}  // namespace emulated
inline cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
    int k, const void* alpha, const void* a, cudaDataType, int lda, long long sa, const void* b, cudaDataType, int ldb,
    long long sb, const void* beta, void* c, cudaDataType type, int ldc, long long sc, int count, cublasComputeType_t,
    cublasGemmAlgo_t) {
  const int rows_a = ta == CUBLAS_OP_N ? m : k, rows_b = tb == CUBLAS_OP_N ? k : n;
  if (m < 0 || n < 0 || k < 0 || count < 0 || lda < std::max(1, rows_a) || ldb < std::max(1, rows_b) || ldc < std::max(1, m))
    return CUBLAS_STATUS_INVALID_VALUE;
  for (int i = 0; i < count; ++i)
    if (type == CUDA_R_64F)
      emulated::gemm<double>(ta, tb, m, n, k, *(const double*)alpha, (const double*)a + i * sa, lda, (const double*)b + i * sb,
                        ldb, *(const double*)beta, (double*)c + i * sc, ldc);
    else
      emulated::gemm<float>(ta, tb, m, n, k, *(const float*)alpha, (const float*)a + i * sa, lda, (const float*)b + i * sb, ldb,
                       *(const float*)beta, (float*)c + i * sc, ldc);
  return CUBLAS_STATUS_SUCCESS;
}
// C = alpha op(A) B or alpha B op(A), A triangular; C may be B.
inline cublasStatus_t cublasDtrmm(cublasHandle_t, cublasSideMode_t side, cublasFillMode_t fill, cublasOperation_t op,
    cublasDiagType_t, int m, int n, const double* alpha, const double* a, int lda, const double* b, int ldb, double* c,
    int ldc) {
  const int d = side == CUBLAS_SIDE_LEFT ? m : n;
  if (m < 0 || n < 0 || lda < std::max(1, d) || ldb < std::max(1, m) || ldc < std::max(1, m)) return CUBLAS_STATUS_INVALID_VALUE;
  std::vector<double> t(size_t(d) * d, 0.0), copy(size_t(m) * n);
  for (int j = 0; j < d; ++j)
    for (int i = 0; i < d; ++i)
      if (fill == CUBLAS_FILL_MODE_UPPER ? i <= j : i >= j) t[op == CUBLAS_OP_N ? i + size_t(j) * d : j + size_t(i) * d] = a[i + int64_t(j) * lda];
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) copy[i + size_t(j) * m] = b[i + int64_t(j) * ldb];
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      double sum = 0;
      if (side == CUBLAS_SIDE_LEFT)
        for (int p = 0; p < m; ++p) sum += t[i + size_t(p) * d] * copy[p + size_t(j) * m];
      else
        for (int p = 0; p < n; ++p) sum += copy[i + size_t(p) * m] * t[p + size_t(j) * d];
      c[i + int64_t(j) * ldc] = *alpha * sum;
    }
  return CUBLAS_STATUS_SUCCESS;
}
