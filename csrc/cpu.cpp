// Operator schemas, and the primitives of trace_sqrt_product on the CPU.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "aten.h"
#include "pivoted_cholesky.h"
#include "trace_sqrt_product.h"

namespace fastgan {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kTile = 64;          // two float64 tiles stand in the first-level cache
constexpr int64_t kSandwichColumns = 256, kSandwichRows = 512;

double* data_of(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

// Calls visit(i, j, end_i, end_j) for the tiles on and below the diagonal of rows [begin, end) of tiles.
template <typename Visit>
void for_lower_tiles(int64_t d, int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t i = begin * kTile; i < std::min(d, end * kTile); i += kTile)
    for (int64_t j = 0; j <= i; j += kTile) visit(i, j, std::min(d, i + kTile), std::min(d, j + kTile));
}

// Tiles pass through two buffers, row by row: the columns of a matrix whose rows are a power of two apart would all
// meet in the same few cache lines.
template <typename T>
void symmetrize(const T* a, double* out, int64_t d, double scale) {
  torch::stable::parallel_for(0, (d + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
    double tile[kTile][kTile], mirrored[kTile][kTile];
    for_lower_tiles(d, begin, end, [&](int64_t i0, int64_t j0, int64_t i1, int64_t j1) {
      const int64_t rows = i1 - i0, columns = j1 - j0;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) tile[r][c] = double(a[(i0 + r) * d + j0 + c]) / scale;
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < rows; ++r) mirrored[c][r] = double(a[(j0 + c) * d + i0 + r]) / scale;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) tile[r][c] = mirrored[c][r] = 0.5 * (tile[r][c] + mirrored[c][r]);
      for (int64_t r = 0; r < rows; ++r) std::copy_n(tile[r], columns, out + (i0 + r) * d + j0);
      for (int64_t c = 0; c < columns; ++c) std::copy_n(mirrored[c], rows, out + (j0 + c) * d + i0);
    });
  });
}

template <typename T>
double power_of_two(const T* a, int64_t size) {
  T largest = 0;
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(a[i]));
  return power_of_two_scale(double(largest));
}

template <typename T>
void scale_and_symmetrize(const Tensor& dense, double* scales, double* out) {
  const int64_t d = dense.size(1);
  const auto* a = static_cast<const T*>(dense.data_ptr());
  torch::stable::parallel_for(0, dense.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      scales[n] = power_of_two(a + n * d * d, d * d);
      symmetrize(a + n * d * d, out + n * d * d, d, scales[n]);
    }
  });
}

// Powers of two (n,) and the symmetric float64 matrices (n, d, d) divided by them.
std::tuple<Tensor, Tensor> scaled_cpu(const Tensor& a) {
  const Tensor dense = torch::stable::contiguous(a);
  Tensor scales = torch::stable::new_empty(a, {a.size(0)}, ScalarType::Double);
  Tensor out = torch::stable::new_empty(a, {a.size(0), a.size(1), a.size(1)}, ScalarType::Double);
  if (a.scalar_type() == ScalarType::Float)
    scale_and_symmetrize<float>(dense, data_of(scales), data_of(out));
  else
    scale_and_symmetrize<double>(dense, data_of(scales), data_of(out));
  return {scales, out};
}

Tensor symmetrized(const Tensor& a, double scale) {
  const Tensor dense = torch::stable::contiguous(a);
  const int64_t d = a.size(0);
  Tensor out = torch::stable::new_empty(a, {d, d}, ScalarType::Double);
  auto* target = static_cast<double*>(out.data_ptr());
  if (a.scalar_type() == ScalarType::Float)
    symmetrize(static_cast<const float*>(dense.data_ptr()), target, d, scale);
  else
    symmetrize(static_cast<const double*>(dense.data_ptr()), target, d, scale);
  return out;
}

Tensor part(const Tensor& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  Tensor band = m;
  band = torch::stable::narrow(band, 0, row, rows);
  return torch::stable::narrow(band, 1, column, columns);
}

// Column block J of L^T B L, at and below its diagonal, needs B and L from J on only, and of its row block I needs L from
// I on: a quarter of the operations of two full products.
Tensor triangular_sandwich(const Tensor& lower, const Tensor& b) {
  const int64_t d = lower.size(0), rank = lower.size(1);
  Tensor out = torch::stable::new_empty(b, {rank, rank});
  for (int64_t j = 0; j < rank; j += kSandwichColumns) {
    const int64_t columns = std::min(kSandwichColumns, rank - j);
    Tensor panel = torch::stable::matmul(part(b, j, d - j, j, d - j), part(lower, j, d - j, j, columns));
    for (int64_t i = j; i < rank; i += kSandwichRows) {
      const int64_t rows = std::min(kSandwichRows, rank - i);
      const Tensor factor = torch::stable::transpose(part(lower, i, d - i, i, rows), 0, 1);
      aten::mm_out(factor, torch::stable::narrow(panel, 0, i - j, d - i), part(out, i, rows, j, columns));
    }
  }
  return out;
}

// What the factor's next rows leave: two matrices by turns, of which one is read while the other is written.
class Complement {
 public:
  Complement(const Tensor& like, const Tensor& block) : block_(block) {
    const int64_t d = like.size(0);
    for (Tensor& room : rooms_) room = torch::stable::new_empty(like, {d * d});
  }

  const double* operator()(const double* rest, int64_t size, int64_t count, const std::vector<int64_t>& kept) {
    const auto left = int64_t(kept.size());
    std::swap(rooms_[0], rooms_[1]);
    const Tensor rows = part(block_, 0, count, 0, left);
    const Tensor out = torch::stable::view(torch::stable::narrow(rooms_[0], 0, 0, left * left), {left, left});
    aten::mm_out(torch::stable::transpose(rows, 0, 1), rows, out);
    double* next = data_of(out);
    torch::stable::parallel_for(0, left, kTile, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < left; ++j) next[i * left + j] = rest[kept[i] * size + kept[j]] - next[i * left + j];
    });
    return next;
  }

 private:
  Tensor block_, rooms_[2];
};

// Rows (r, d), the order of the pivots (d,) and what is left of A, (1,).
std::tuple<Tensor, Tensor, Tensor> pivoted_cholesky_cpu(const Tensor& a) {
  const Tensor dense = torch::stable::contiguous(a);
  const int64_t d = a.size(0);
  Tensor rows = torch::stable::new_zeros(a, {d, d}), block = torch::stable::new_empty(a, {kPivotBlock, d});
  const PivotedFactor factor =
      pivoted_cholesky(data_of(dense), d, data_of(rows), data_of(block), Complement(dense, block));
  Tensor order = torch::stable::new_empty(a, {d}, ScalarType::Long);
  std::copy(factor.order.begin(), factor.order.end(), static_cast<int64_t*>(order.data_ptr()));
  Tensor remainder = torch::stable::new_empty(a, {1});
  *data_of(remainder) = factor.remainder;
  return {torch::stable::narrow(rows, 0, 0, factor.rank), order, remainder};
}

std::optional<FactorRows> semidefinite_factor(const Tensor& a) {
  auto [rows, order, remainder] = pivoted_cholesky_cpu(a);
  if (!(*data_of(remainder) <= 2 * pivot_floor(data_of(a), a.size(0)))) return std::nullopt;
  return FactorRows{rows, order};
}

// Rows and columns of a symmetric matrix in an order.
Tensor reordered(const Tensor& a, const Tensor& order) {
  const Tensor dense = torch::stable::contiguous(a);
  const int64_t d = a.size(0);
  Tensor out = torch::stable::empty_like(dense);
  const double* from = data_of(dense);
  double* to = data_of(out);
  const auto* index = static_cast<const int64_t*>(order.data_ptr());
  torch::stable::parallel_for(0, d, kTile, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < d; ++j) to[i * d + j] = from[index[i] * d + index[j]];
  });
  return out;
}

std::vector<double> to_host(const Tensor& vector) {
  const Tensor wide = torch::stable::contiguous(torch::stable::to(vector, ScalarType::Double));
  const auto* data = static_cast<const double*>(wide.data_ptr());
  return {data, data + wide.numel()};
}

// Largest magnitudes of A - A^T and of A in one row of tiles of (d, d) A, NaN where an entry is not finite.
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

// To `out` (count, 2), of `a` (count, d, d).
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

Tensor asymmetry_cpu(const Tensor& a) {
  const Tensor dense = torch::stable::contiguous(a);
  const int64_t count = a.size(0), d = a.size(1);
  Tensor out = torch::stable::new_zeros(a, {count, 2}, ScalarType::Double);
  auto* rows = static_cast<double*>(out.data_ptr());
  if (a.scalar_type() == ScalarType::Float)
    measure_asymmetry(static_cast<const float*>(dense.data_ptr()), count, d, rows);
  else
    measure_asymmetry(static_cast<const double*>(dense.data_ptr()), count, d, rows);
  return out;
}

const Primitives kPrimitives{&symmetrized, &triangular_sandwich, &to_host, &semidefinite_factor, &reordered};

Tensor trace_sqrt_product_cpu(const Tensor& a, const Tensor& b, const Tensor& pairs, int64_t method) {
  return trace_sqrt_products(kPrimitives, a, b, pairs, method);
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
  m.def("has_cuda() -> bool");
  m.def("asymmetry(Tensor a) -> Tensor");
  m.def("scaled(Tensor a) -> (Tensor, Tensor)");
  m.def("pivoted_cholesky(Tensor a) -> (Tensor, Tensor, Tensor)");
  m.def("trace_sqrt_product(Tensor a, Tensor b, Tensor pairs, int method) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CompositeExplicitAutograd, m) {
  m.impl("has_cuda", TORCH_BOX(&fastgan::has_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CPU, m) {
  m.impl("asymmetry", TORCH_BOX(&fastgan::asymmetry_cpu));
  m.impl("scaled", TORCH_BOX(&fastgan::scaled_cpu));
  m.impl("pivoted_cholesky", TORCH_BOX(&fastgan::pivoted_cholesky_cpu));
  m.impl("trace_sqrt_product", TORCH_BOX(&fastgan::trace_sqrt_product_cpu));
}
