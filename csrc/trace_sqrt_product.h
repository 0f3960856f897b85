// tr((A B)^{1/2}) for symmetric positive semi-definite A, B: one algorithm, with its primitives given per device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

namespace fastgan {

using torch::stable::Tensor;

// The power of two at or below the largest magnitude: dividing by it is exact.
inline double power_of_two_scale(double largest) {
  if (!(largest > 0)) return 1;
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, exponent - 1);
}

// F with F F^T = A up to rounding, by rows: those of F^T.
struct [[gnu::visibility("hidden")]] FactorRows {
  Tensor rows;                  // (r, d)
  std::optional<Tensor> order;  // int64 (d,): with its columns in this order, `rows` is upper trapezoidal
};

struct Primitives {
  // (A + A^T) / (2 scale) in float64, for one (d, d) float32 or float64 matrix.
  Tensor (*symmetrized)(const Tensor& a, double scale);
  // Lower triangle of L^T B L, L (d, r) lower trapezoidal, square on a GPU; what stands above the diagonal is unspecified.
  Tensor (*triangular_sandwich)(const Tensor& lower, const Tensor& b);
  // A copy on the host of a float64 or int32 vector, widened to double.
  std::vector<double> (*to_host)(const Tensor& vector);
  // Of a (d, d) float64 matrix, as in fastgan/reference/pivoted_cholesky.py, or nothing where the matrix is not
  // semi-definite to rounding. Null on a GPU, where it would wait for the device at each pivot.
  std::optional<FactorRows> (*pivoted_cholesky)(const Tensor& a);
  // Rows and columns of a symmetric matrix in the order of such a factor; null with it.
  Tensor (*reordered)(const Tensor& a, const Tensor& order);
};

// Rows (value, error bound, method) for the index pairs (i, j) into a (na, d, d) and b (nb, d, d); `pairs` is (n, 2)
// int64 on the host, and so is the (n, 3) float64 result. See fastgan/reference/trace_sqrt_product.py, which it equals.
Tensor trace_sqrt_products(const Primitives& primitives, const Tensor& a, const Tensor& b, const Tensor& pairs,
                           int64_t method);

}  // namespace fastgan
