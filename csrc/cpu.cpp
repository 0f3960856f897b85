// Schemas of all operators, and the operators on CPU tensors for passes over matrices, pivoted Cholesky and
// small_trace. Attention, its projections and spectral norms are in files of those names. nuclear_norm and sqrtm exist
// only for CUDA tensors (cuda.cu): on a CPU, matrix products take nearly all of their time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "definite_trace.h"
#include "pivoted_cholesky.h"
#include "small_trace.h"
#include "variants.h"
#include "workspace.h"

namespace fastgan {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 64;  // two float64 tiles fit in the first-level cache

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls f(T()) with the element type T of float32 or float64 `tensor`.
template <typename F>
void for_type_of(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == ScalarType::Float)
    f(float());
  else
    f(double());
}

// Calls visit(i, j, end_i, end_j) for the tiles on and below the diagonal of rows [begin, end) of tiles.
template <typename Visit>
void for_lower_tiles(int64_t d, int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t i = begin * kTile; i < std::min(d, end * kTile); i += kTile)
    for (int64_t j = 0; j <= i; j += kTile) visit(i, j, std::min(d, i + kTile), std::min(d, j + kTile));
}

// Copies tiles into two buffers row by row: if rows are a power of two apart, all entries of a column map to the same
// few cache sets.
template <typename T>
void symmetrize(const T* a, double* out, int64_t d, double scale) {
  const double inverse = 1 / scale;
  torch::stable::parallel_for(0, (d + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
    double tile[kTile][kTile], mirrored[kTile][kTile];
    for_lower_tiles(d, begin, end, [&](int64_t i0, int64_t j0, int64_t i1, int64_t j1) {
      const int64_t rows = i1 - i0, columns = j1 - j0;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) tile[r][c] = double(a[(i0 + r) * d + j0 + c]) * inverse;
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < rows; ++r) mirrored[c][r] = double(a[(j0 + c) * d + i0 + r]) * inverse;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) tile[r][c] = mirrored[c][r] = 0.5 * (tile[r][c] + mirrored[c][r]);
      for (int64_t r = 0; r < rows; ++r) std::copy_n(tile[r], columns, out + (i0 + r) * d + j0);
      for (int64_t c = 0; c < columns; ++c) std::copy_n(mirrored[c], rows, out + (j0 + c) * d + i0);
    });
  });
}

// The power of two at or below the largest magnitude, 1 for zero, at least the smallest normal number: multiplying by
// its inverse is exact. Keeps sixteen running maxima, since with one each comparison would wait for the last.
template <typename T>
double power_of_two(const T* a, int64_t size) {
  constexpr int64_t kLanes = 16;
  T largest[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) largest[k] = std::max(largest[k], std::abs(a[i + k]));
  for (; i < size; ++i) largest[0] = std::max(largest[0], std::abs(a[i]));
  const T all = *std::max_element(largest, largest + kLanes);
  if (!(all > 0)) return 1;
  int exponent = 0;
  std::frexp(double(all), &exponent);
  return std::max(std::ldexp(1.0, exponent - 1), std::numeric_limits<double>::min());
}

// Powers of two (n,) and the symmetric float64 matrices (n, d, d) divided by them.
std::tuple<Tensor, Tensor> scaled(const Tensor& a) {
  const Tensor dense = torch::stable::contiguous(a);
  const int64_t d = a.size(1);
  Tensor scales = torch::stable::new_empty(a, {a.size(0)}, ScalarType::Double);
  Tensor out = torch::stable::new_empty(a, {a.size(0), d, d}, ScalarType::Double);
  for_type_of(a, [&](auto zero) {
    const auto* from = data_of<decltype(zero)>(dense);
    double *scale = data_of<double>(scales), *to = data_of<double>(out);
    torch::stable::parallel_for(0, a.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        scale[n] = power_of_two(from + n * d * d, d * d);
        symmetrize(from + n * d * d, to + n * d * d, d, scale[n]);
      }
    });
  });
  return {scales, out};
}

// out <- a b, out being a block of a larger matrix.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result, which is `out`
}

// The matrix that the factor's rows leave: two buffers by turns, one read while the other is written.
class Complement {
 public:
  Complement(const Tensor& like, const Tensor& block) : block_(block) {
    const int64_t d = like.size(0);
    for (Tensor& room : rooms_) room = torch::stable::new_empty(like, {d * d});
  }

  const double* operator()(const double* rest, int64_t size, int64_t count, const std::vector<int64_t>& kept) {
    const auto left = int64_t(kept.size());
    std::swap(rooms_[0], rooms_[1]);
    Tensor rows = torch::stable::narrow(block_, 0, 0, count);
    rows = torch::stable::narrow(rows, 1, 0, left);
    const Tensor out = torch::stable::view(torch::stable::narrow(rooms_[0], 0, 0, left * left), {left, left});
    multiply(torch::stable::transpose(rows, 0, 1), rows, out);
    auto* next = data_of<double>(out);
    torch::stable::parallel_for(0, left, kTile, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < left; ++j) next[i * left + j] = rest[kept[i] * size + kept[j]] - next[i * left + j];
    });
    return next;
  }

 private:
  Tensor block_, rooms_[2];
};

// Returns rows (r, d), the order of the pivots (d,) and the largest remaining magnitude (1,) of a float64 A (d, d),
// like fastgan/linalg/_pivoted.py.
std::tuple<Tensor, Tensor, Tensor> pivoted_factor(const Tensor& a) {
  const Tensor dense = torch::stable::contiguous(a);
  const int64_t d = a.size(0);
  Tensor rows = torch::stable::new_zeros(a, {d, d}), block = torch::stable::new_empty(a, {kPivotBlock, d});
  const PivotedFactor factor = pivoted_cholesky(data_of<double>(dense), d, data_of<double>(rows),
                                                data_of<double>(block), Complement(dense, block));
  Tensor order = torch::stable::new_empty(a, {d}, ScalarType::Long);
  std::copy(factor.order.begin(), factor.order.end(), data_of<int64_t>(order));
  Tensor remainder = torch::stable::new_empty(a, {1});
  *data_of<double>(remainder) = factor.remainder;
  return {torch::stable::narrow(rows, 0, 0, factor.rank), order, remainder};
}

// Largest magnitudes of A - A^T and of A in one row of tiles of (d, d) A; NaN if an entry is not finite.
template <typename T>
void measure_tile_row(const T* a, int64_t d, int64_t row, double* difference, double* largest) {
  T gap = 0, magnitude = 0, poison = 0;  // 0 * x is NaN for every non-finite x; a comparison would lose it
  for_lower_tiles(d, row, row + 1, [&](int64_t i0, int64_t j0, int64_t i1, int64_t j1) {
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = j0; j < std::min(j1, i + 1); ++j) {
        const T x = a[i * d + j], y = a[j * d + i];
        gap = std::max(gap, std::abs(x - y));
        magnitude = std::max(magnitude, std::max(std::abs(x), std::abs(y)));
        poison += T(0) * x + T(0) * y;
      }
  });
  *difference = double(gap) + double(poison);
  *largest = double(magnitude) + double(poison);
}

// Writes them to `out` (count, 2) for `a` (count, d, d).
template <typename T>
void measure_asymmetry(const T* a, int64_t count, int64_t d, double* out) {
  const int64_t tiles = (d + kTile - 1) / kTile;
  std::vector<double> measured(2 * count * tiles);
  torch::stable::parallel_for(0, count * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      measure_tile_row(a + k / tiles * d * d, d, k % tiles, &measured[2 * k], &measured[2 * k + 1]);
  });
  const auto keep_nan = [](double x, double y) { return std::isnan(x) || x > y ? x : y; };
  for (int64_t k = 0; k < count * tiles; ++k)
    for (int64_t column : {0, 1}) {
      double& result = out[2 * (k / tiles) + column];
      result = keep_nan(measured[2 * k + column], result);
    }
}

Tensor asymmetry(const Tensor& a) {
  const Tensor dense = torch::stable::contiguous(a);
  Tensor out = torch::stable::new_zeros(a, {a.size(0), 2}, ScalarType::Double);
  for_type_of(a, [&](auto zero) {
    measure_asymmetry(data_of<decltype(zero)>(dense), a.size(0), a.size(1), data_of<double>(out));
  });
  return out;
}

struct OneThread {
  int worker() const { return 0; }
  int workers() const { return 1; }
  int lane() const { return 0; }
  int lanes() const { return 1; }
  double sum(double x) const { return x; }
  void sync() const {}
};

// Returns rows (value, error bound, 1 if semi-definite else 0) for the pairs of indices into a and b (n, d, d), d <=
// 64.
Tensor small_trace(const Tensor& a, const Tensor& b, const Tensor& pairs) {
  const Tensor dense_a = torch::stable::contiguous(a), dense_b = torch::stable::contiguous(b);
  const Tensor dense_pairs = torch::stable::contiguous(pairs);
  const int64_t d = a.size(1);
  Tensor rows = torch::stable::new_empty(a, {pairs.size(0), 3}, ScalarType::Double);
  for_type_of(a, [&](auto zero) {
    using T = decltype(zero);
    const T *x = data_of<T>(dense_a), *y = data_of<T>(dense_b);
    const auto* index = data_of<int64_t>(dense_pairs);
    auto* out = data_of<double>(rows);
    torch::stable::parallel_for(0, pairs.size(0), 1, [&](int64_t begin, int64_t end) {
      const auto workspace = std::make_unique<double[]>(small_workspace(d));
      OneThread group;
      SmallTrace<OneThread, T> solver(group, int(d), workspace.get());
      for (int64_t n = begin; n < end; ++n)
        solver.run(x + index[2 * n] * d * d, y + index[2 * n + 1] * d * d, out + 3 * n);
    });
  });
  return rows;
}

// Returns values (*shape), rows (lower bound, upper bound, 0, 0), and whether all were found, for a (..., d, d) and
// b (*shape, d, d), d <= kLargestDefinite. `a` has one matrix or as many as b. If one value was not found, others may
// be missing too.
std::tuple<Tensor, Tensor, bool> definite_trace(const Tensor& a, const Tensor& b, std::vector<int64_t> shape,
                                                double tolerance) {
  const Tensor dense_a = torch::stable::contiguous(a), dense_b = torch::stable::contiguous(b);
  const int64_t d = a.size(a.dim() - 1), factors = a.numel() / (d * d), pairs = b.numel() / (d * d);
  Tensor values = torch::stable::new_empty(a, shape);
  shape.push_back(4);
  Tensor report = torch::stable::new_empty(a, shape, ScalarType::Double);
  const DefiniteTraceKernels& kernels = definite_trace_kernels(a.scalar_type() == ScalarType::Double);
  std::atomic<bool> found{true};
  for_type_of(a, [&](auto zero) {
    using T = decltype(zero);
    const T *x = data_of<T>(dense_a), *y = data_of<T>(dense_b);
    T* value = data_of<T>(values);
    auto* row = data_of<double>(report);
    const auto room_of = [](int64_t elements) { return Room(elements * sizeof(double)); };
    const Room shared = room_of(factors == 1 ? definite_elements(d) : 0);
    double shared_scale = 0;
    if (factors == 1) shared_scale = kernels.factor(x, d, static_cast<double*>(shared.data()));
    torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
      const Room room = room_of(definite_elements(d) + definite_room(d));
      auto* own = static_cast<double*>(room.data());
      for (int64_t n = begin; n < end && found; ++n) {
        const double scale = factors == 1 ? shared_scale : kernels.factor(x + n * d * d, d, own);
        const double* lower = factors == 1 ? static_cast<double*>(shared.data()) : own;
        double trace = 0, bound = 0;
        if (scale == 0 ||
            !kernels.trace(lower, scale, y + n * d * d, d, tolerance, own + definite_elements(d), &trace, &bound)) {
          found = false;
          return;
        }
        value[n] = T(trace);
        row[4 * n] = std::max(trace - bound, 0.0);
        row[4 * n + 1] = trace + bound;
        row[4 * n + 2] = row[4 * n + 3] = 0;
      }
    });
  });
  return {values, report, found};
}

// Raise this when an operator's signature or meaning changes, and EXTENSION_INTERFACE in fastgan/backend.py with it:
// Python code that expects another number does not use the extension.
int64_t interface_version() {
  return 3;
}

bool has_cuda() {
#ifdef USE_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY(fastgan_C, m) {
  m.def("interface_version() -> int");
  m.def("has_cuda() -> bool");
  m.def("asymmetry(Tensor a) -> Tensor");
  m.def("scaled(Tensor a) -> (Tensor, Tensor)");
  m.def("pivoted_cholesky(Tensor a) -> (Tensor, Tensor, Tensor)");
  m.def("small_trace(Tensor a, Tensor b, Tensor pairs) -> Tensor");
  m.def("definite_trace(Tensor a, Tensor b, int[] shape, float tolerance) -> (Tensor, Tensor, bool)");
  m.def("nuclear_norm(Tensor m, bool low_precision, float tolerance) -> (Tensor, Tensor)");
  m.def("sqrtm(Tensor a, bool inverse) -> Tensor");
  m.def("vector_bits() -> int");
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, bool is_causal, float scale, "
      "Tensor(a!) o, Tensor(b!) stats) -> ()");
  m.def(
      "attention_bwd(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, Tensor o, Tensor stats, "
      "bool is_causal, float scale, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? d_sinks) -> ()");
  m.def(
      "attention_bwd_bwd(Tensor ggq, Tensor? ggk, Tensor? ggv, Tensor? gg_sinks, Tensor grad_o, Tensor q, Tensor k, "
      "Tensor v, Tensor? mask, Tensor? sinks, Tensor stats, bool is_causal, float scale, Tensor(a!) g_do, "
      "Tensor(b!) gq, Tensor(c!) gk, Tensor(d!) gv, Tensor(e!)? g_sinks) -> ()");
  m.def(
      "pooled_projection(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) q, Tensor(b!) kv, Tensor(c!) index) -> ()");
  m.def(
      "spectral_norm_update(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, int[] dims, int iterations, float eps, "
      "bool v_first, Tensor(c!) u, Tensor(d!) v, Tensor(e!) sigma) -> ()");
  m.def(
      "spectral_norm_scale(Tensor[] weights, Tensor u, Tensor v, Tensor sigma, int[] dims, ScalarType dtype) -> "
      "Tensor[]");
  m.def(
      "spectral_norm_scale_bwd(Tensor[] grads, Tensor[] weights, Tensor u, Tensor v, Tensor sigma, int[] dims) -> "
      "Tensor[]");
  m.def(
      "spectral_norm_scale_bwd_bwd(Tensor[] grad_grads, Tensor[] grads, Tensor[] weights, Tensor u, Tensor v, "
      "Tensor sigma, int[] dims) -> Tensor[]");
  m.def("release_memory() -> int");
  m.def(
      "attention_block(Tensor h, Tensor weight, Tensor? bias, int d, Tensor out_weight, Tensor? out_bias, Tensor x, "
      "float scale) -> Tensor");
  m.def(
      "projection_gradients(Tensor dy, Tensor x, Tensor weight, Tensor(a!) dx, Tensor(b!) dweight) -> ()");
  m.def("unpool(Tensor grad_q, Tensor grad_kv, Tensor index, int width, Tensor(a!) out) -> ()");
  m.def("gather_pooled(Tensor grad, Tensor index, int width, Tensor(a!) q, Tensor(b!) kv) -> ()");
  m.def("projection_residual(Tensor rows, Tensor weight, Tensor? bias, Tensor x, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CompositeExplicitAutograd, m) {
  m.impl("interface_version", TORCH_BOX(&fastgan::interface_version));
  m.impl("has_cuda", TORCH_BOX(&fastgan::has_cuda));
  m.impl("vector_bits", TORCH_BOX(&fastgan::vector_bits));
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CPU, m) {
  m.impl("asymmetry", TORCH_BOX(&fastgan::asymmetry));
  m.impl("scaled", TORCH_BOX(&fastgan::scaled));
  m.impl("pivoted_cholesky", TORCH_BOX(&fastgan::pivoted_factor));
  m.impl("small_trace", TORCH_BOX(&fastgan::small_trace));
  m.impl("definite_trace", TORCH_BOX(&fastgan::definite_trace));
}
