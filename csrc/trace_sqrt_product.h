// tr((A B)^{1/2}) for symmetric positive semi-definite A, B: one algorithm, with its primitives given per device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastgan {

using torch::stable::Tensor;

struct Primitives {
  // (A + A^T) / (2 scale) in float64, for one (d, d) float32 or float64 matrix.
  Tensor (*symmetrized)(const Tensor& a, double scale);
  // Lower triangle of L^T B L, L lower triangular; what stands above the diagonal is unspecified.
  Tensor (*triangular_sandwich)(const Tensor& lower, const Tensor& b);
  // A copy on the host of a float64 or int32 vector, widened to double.
  std::vector<double> (*to_host)(const Tensor& vector);
};

// Rows (value, error bound, method) for the index pairs (i, j) into a (na, d, d) and b (nb, d, d); `pairs` is (n, 2)
// int64 on the host, and so is the (n, 3) float64 result. See fastgan/reference/trace_sqrt_product.py, which it equals.
Tensor trace_sqrt_products(const Primitives& primitives, const Tensor& a, const Tensor& b, const Tensor& pairs,
                           int64_t method);

}  // namespace fastgan
