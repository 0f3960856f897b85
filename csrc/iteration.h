// The common part of the matrix iterations: coefficients of their steps and terms that devices evaluate. No torch here.
//
// A Device has row-major batches of matrices and five primitives:
//   Device::Matrix<T>                       data, count, rows, cols; copies share the memory
//   empty<T>(count, rows, cols)             a new one
//   multiply(a, b, transpose_b, out)        out_i = a_i b_i or a_i b_i^T; `out` is neither operand
//   map(count, size, f)                     calls f(i, k) for each matrix i and entry k, in any order
//   sum(count, size, f, out)                out[i] = the sum of f(i, k) over k, in an order that depends on size alone
//   finished(flags, count)                  true if the host knows that all are set; never waits within a graph
// Each f is a struct with a call operator; the same source is compiled for the host and the device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define FASTGAN_HD __host__ __device__
#else
#define FASTGAN_HD
#endif

namespace fastgan {

// x <- linear x - cubic x^3 on singular values.
struct Step {
  double linear, cubic;
};

constexpr Step kNewtonSchulz{1.5, 0.5};

// The steps that bring singular values in [smallest, 1] within 1e-8 of 1, plus one: the scaled Newton-Schulz
// iteration of Chen & Chow ("A stable scaling of Newton-Schulz for improving the sign function computation of a
// Hermitian matrix", 2014), 3 rho / 2 and rho^3 / 2 with rho^2 = 3 / (1 + l + l^2). They map [l, 1] onto
// [min(p(l), p(1)), 1]. Near l = 0 that rho sends 1 to almost 0, where rounding would drown it: kLargest keeps p(1)
// above 1/6, but small values grow by 2.51 instead of 2.60 per step.
inline std::vector<Step> scaled_newton_schulz(double smallest) {
  constexpr double kLargest = 2.8;
  constexpr double kClose = 1e-8;
  std::vector<Step> steps;
  double l = smallest;
  while (1 - l > kClose) {
    const double rho = std::sqrt(std::min(kLargest, 3 / (1 + l + l * l)));
    const Step step{1.5 * rho, 0.5 * rho * rho * rho};
    steps.push_back(step);
    l = std::min(step.linear * l - step.cubic * l * l * l, step.linear - step.cubic);
  }
  steps.push_back(kNewtonSchulz);
  return steps;
}

struct Fill {
  double* out;
  int64_t size;
  double value;
  FASTGAN_HD void operator()(int64_t i, int64_t k) const { out[i * size + k] = value; }
};

// x <- linear x - cubic y for the matrices that are not done.
template <typename T>
struct Combine {
  T* x;
  const T* y;
  const double* done;
  int64_t size;
  T linear, cubic;
  FASTGAN_HD void operator()(int64_t i, int64_t k) const {
    if (done[i] == 0) x[i * size + k] = linear * x[i * size + k] - cubic * y[i * size + k];
  }
};

// out <- a / scale, or 0 for scale 0, for the matrices that are not done.
template <typename In, typename Out>
struct Scale {
  const In* a;
  Out* out;
  const double* scale;
  const double* done;
  int64_t size;
  FASTGAN_HD void operator()(int64_t i, int64_t k) const {
    if (done[i] == 0) out[i * size + k] = scale[i] > 0 ? Out(a[i * size + k] / scale[i]) : Out(0);
  }
};

struct SquareOf {
  const double* a;
  int64_t size;
  FASTGAN_HD double operator()(int64_t i, int64_t k) const { return a[i * size + k] * a[i * size + k]; }
};

struct SquaredDifference {
  const double* a;
  const double* b;
  int64_t size;
  FASTGAN_HD double operator()(int64_t i, int64_t k) const {
    const double difference = a[i * size + k] - b[i * size + k];
    return difference * difference;
  }
};

}  // namespace fastgan
