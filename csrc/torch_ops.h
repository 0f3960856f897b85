// The iterations as operators on torch tensors, for a Device whose matrices live in tensors.
#pragma once

#include <tuple>

#include "aten.h"
#include "nuclear_norm.h"
#include "sqrtm.h"

namespace fastgan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

template <typename T>
TensorMatrix<T> new_matrix(const Tensor& like, int64_t count, int64_t rows, int64_t cols) {
  const auto type = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
  return as_matrix<T>(torch::stable::new_empty(like, {count, rows, cols}, type));
}

// Polar factors and reports (n, 3), value, error estimate and iterations, of float64 m (n, rows, cols), rows <= cols.
template <class Device>
std::tuple<Tensor, Tensor> nuclear_norm(const Tensor& m, bool low_precision, double tolerance) {
  const Tensor dense = torch::stable::contiguous(m);
  Device device(dense);
  auto matrices = as_matrix<double>(dense);
  auto factors = device.template empty<double>(matrices.count, matrices.rows, matrices.cols);
  auto report = device.template empty<double>(1, matrices.count, kReportColumns);
  PolarIteration<Device>(device, matrices, factors, report, tolerance).run(low_precision);
  return {factors.tensor, torch::stable::select(report.tensor, 0, 0)};
}

// A^{1/2} or A^{-1/2} of float64 a (n, d, d).
template <class Device>
Tensor sqrtm(const Tensor& a, bool inverse) {
  const Tensor dense = torch::stable::contiguous(a);
  Device device(dense);
  auto matrices = as_matrix<double>(dense);
  auto root = device.template empty<double>(matrices.count, matrices.rows, matrices.rows);
  coupled_newton_schulz(device, matrices, root, inverse);
  return root.tensor;
}

}  // namespace fastgan
