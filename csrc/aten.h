// The few ATen operators the library needs, called through the stable dispatcher: one binary serves torch >= 2.11.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

namespace fastgan::aten {

using torch::stable::Tensor;

// The operator's results, as many as the array has, which must be all of them.
template <size_t Results = 1, class... Arguments>
std::array<Tensor, Results> call(const char* name, const char* overload, const Arguments&... arguments) {
  using torch::stable::detail::from;
  std::array<StableIValue, std::max(Results, sizeof...(Arguments))> stack{from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, Results> results;
  for (size_t i = 0; i < Results; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return results;
}

// Lower factor and LAPACK's info: not zero where `a` is not positive definite.
inline std::array<Tensor, 2> cholesky_ex(const Tensor& a) { return call<2>("aten::linalg_cholesky_ex", "", a, false, false); }

// Eigenvalues in ascending order and eigenvectors in columns, from the lower triangle.
inline std::array<Tensor, 2> eigh(const Tensor& a) { return call<2>("aten::linalg_eigh", "", a, std::string("L")); }

inline Tensor eigvalsh(const Tensor& a) { return call("aten::linalg_eigvalsh", "", a, std::string("L"))[0]; }

inline Tensor svdvals(const Tensor& a) { return call("aten::linalg_svdvals", "", a, std::nullopt)[0]; }

// out <- a b, batch by batch.
inline void bmm_out(const Tensor& a, const Tensor& b, const Tensor& out) { call("aten::bmm", "out", a, b, out); }

// out <- a b; `out` may be a block of a larger matrix.
inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) { call("aten::mm", "out", a, b, out); }

// X with lower X = b, `lower` being lower triangular.
inline Tensor solve_lower(const Tensor& lower, const Tensor& b) {
  return call("aten::linalg_solve_triangular", "", lower, b, false, true, false)[0];
}

// The sum of the products of the entries of two vectors.
inline Tensor dot(const Tensor& a, const Tensor& b) { return call("aten::dot", "", a, b)[0]; }

inline Tensor max(const Tensor& a) { return call("aten::max", "", a)[0]; }

inline Tensor min(const Tensor& a) { return call("aten::min", "", a)[0]; }

// A view of the main diagonal.
inline Tensor diagonal(const Tensor& a) { return call("aten::diagonal", "", a, int64_t(0), int64_t(0), int64_t(1))[0]; }

// Entries along `dim` in the order that the int64 vector `index` gives.
inline Tensor index_select(const Tensor& a, int64_t dim, const Tensor& index) {
  return call("aten::index_select", "", a, dim, index)[0];
}

inline Tensor mul(const Tensor& a, const Tensor& b) { return call("aten::mul", "Tensor", a, b)[0]; }

inline Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

inline Tensor sqrt(const Tensor& a) { return call("aten::sqrt", "", a)[0]; }

}  // namespace fastgan::aten
