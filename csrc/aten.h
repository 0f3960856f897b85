// The few ATen operators the library needs, called through the stable dispatcher: one binary serves torch >= 2.11.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>
#include <utility>

namespace fastgan::aten {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

template <size_t N>
void call(const char* name, const char* overload, std::array<StableIValue, N>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
}

// Lower factor and LAPACK's info: not zero where `a` is not positive definite.
inline std::pair<Tensor, Tensor> cholesky_ex(const Tensor& a) {
  std::array<StableIValue, 3> stack{from(a), from(false), from(false)};
  call("aten::linalg_cholesky_ex", "", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// Eigenvalues in ascending order and eigenvectors in columns, from the lower triangle.
inline std::pair<Tensor, Tensor> eigh(const Tensor& a) {
  std::array<StableIValue, 2> stack{from(a), from(std::string("L"))};
  call("aten::linalg_eigh", "", stack);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

inline Tensor eigvalsh(const Tensor& a) {
  std::array<StableIValue, 2> stack{from(a), from(std::string("L"))};
  call("aten::linalg_eigvalsh", "", stack);
  return to<Tensor>(stack[0]);
}

inline Tensor svdvals(const Tensor& a) {
  std::array<StableIValue, 2> stack{from(a), from(std::nullopt)};
  call("aten::linalg_svdvals", "", stack);
  return to<Tensor>(stack[0]);
}

// out <- a b, batch by batch.
inline void bmm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  call("aten::bmm", "out", stack);
  to<Tensor>(stack[0]);
}

// out <- a b; `out` may be a block of a larger matrix.
inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  call("aten::mm", "out", stack);
  to<Tensor>(stack[0]);
}

// X with lower X = b, `lower` being lower triangular.
inline Tensor solve_lower(const Tensor& lower, const Tensor& b) {
  std::array<StableIValue, 5> stack{from(lower), from(b), from(false), from(true), from(false)};
  call("aten::linalg_solve_triangular", "", stack);
  return to<Tensor>(stack[0]);
}

// The sum of the products of the entries of two vectors.
inline Tensor dot(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{from(a), from(b)};
  call("aten::dot", "", stack);
  return to<Tensor>(stack[0]);
}

inline Tensor max(const Tensor& a) {
  std::array<StableIValue, 1> stack{from(a)};
  call("aten::max", "", stack);
  return to<Tensor>(stack[0]);
}

inline Tensor min(const Tensor& a) {
  std::array<StableIValue, 1> stack{from(a)};
  call("aten::min", "", stack);
  return to<Tensor>(stack[0]);
}

// A view of the main diagonal.
inline Tensor diagonal(const Tensor& a) {
  std::array<StableIValue, 4> stack{from(a), from(int64_t(0)), from(int64_t(0)), from(int64_t(1))};
  call("aten::diagonal", "", stack);
  return to<Tensor>(stack[0]);
}

inline Tensor mul(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{from(a), from(b)};
  call("aten::mul", "Tensor", stack);
  return to<Tensor>(stack[0]);
}

inline Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

inline Tensor sqrt(const Tensor& a) {
  std::array<StableIValue, 1> stack{from(a)};
  call("aten::sqrt", "", stack);
  return to<Tensor>(stack[0]);
}

}  // namespace fastgan::aten
