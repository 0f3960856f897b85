// Cholesky factor with complete pivoting of a symmetric positive semi-definite matrix, as in
// fastgan/reference/pivoted_cholesky.py. In main memory, and without torch: the products are the caller's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace fastgan {

constexpr int64_t kPivotBlock = 64;
// Pivots and eigenvalues up to d times this share of the largest entry or eigenvalue are no directions.
constexpr double kRounding = 4 * std::numeric_limits<double>::epsilon();

struct PivotedFactor {
  int64_t rank;
  std::vector<int64_t> order;  // of the pivots, then what is left
  double remainder;            // largest magnitude of what is left
};

// A pivot up to this is rounding, and not a direction.
inline double pivot_floor(const double* a, int64_t d) {
  double largest = 0;
  for (int64_t i = 0; i < d; ++i) largest = std::max(largest, a[i * d + i]);
  return double(d) * kRounding * largest;
}

// The next rows of the factor, at most kPivotBlock of them, to `block` with rows `stride` apart; `rest` is what is left,
// (size, size) with rows `stride` apart. Returns the positions of their pivots.
inline std::vector<int64_t> factor_pivot_block(const double* rest, int64_t size, int64_t stride, double floor,
                                               double* block) {
  std::vector<double> diagonal(size);
  for (int64_t i = 0; i < size; ++i) diagonal[i] = rest[i * stride + i];
  std::vector<int64_t> picked;
  while (int64_t(picked.size()) < std::min(kPivotBlock, size)) {
    const int64_t pivot = std::max_element(diagonal.begin(), diagonal.end()) - diagonal.begin();
    if (!(diagonal[pivot] > floor)) break;
    const double root = std::sqrt(diagonal[pivot]);
    double* row = block + int64_t(picked.size()) * stride;
    std::copy_n(rest + pivot * stride, size, row);
    for (const double* earlier = block; earlier != row; earlier += stride) {
      const double factor = earlier[pivot];
      for (int64_t i = 0; i < size; ++i) row[i] -= factor * earlier[i];
    }
    for (int64_t i = 0; i < size; ++i) row[i] /= root;
    for (int64_t i : picked) row[i] = 0;
    row[pivot] = root;
    picked.push_back(pivot);
    for (int64_t i = 0; i < size; ++i) diagonal[i] -= row[i] * row[i];
    for (int64_t i : picked) diagonal[i] = -std::numeric_limits<double>::infinity();
  }
  return picked;
}

// Rows of the factor to the first rows of `rows`, of which all d x d are given and zero. `rest` holds A and is used up,
// `block` is room for kPivotBlock rows of d; gram(count, size) returns block^T block of its leading (count, size) part.
template <class Gram>
PivotedFactor pivoted_cholesky(double* rest, int64_t d, double* rows, double* block, const Gram& gram) {
  const double floor = pivot_floor(rest, d);
  PivotedFactor factor{0, {}, 0};
  std::vector<int64_t> index(d);
  std::iota(index.begin(), index.end(), 0);
  while (!index.empty()) {
    const int64_t size = index.size();
    const std::vector<int64_t> picked = factor_pivot_block(rest, size, d, floor, block);
    if (picked.empty()) break;
    std::vector<int64_t> kept;
    for (int64_t i = 0; i < size; ++i)
      if (std::find(picked.begin(), picked.end(), i) == picked.end()) kept.push_back(i);
    for (int64_t k = 0; k < int64_t(picked.size()); ++k) {
      double *from = block + k * d, *to = rows + factor.rank++ * d;
      for (int64_t i = 0; i < size; ++i) to[index[i]] = from[i];
      for (int64_t i = 0; i < int64_t(kept.size()); ++i) from[i] = from[kept[i]];
    }
    const auto left = int64_t(kept.size());
    const double* product = gram(int64_t(picked.size()), left);
    for (int64_t i = 0; i < left; ++i) {
      const double *from = rest + kept[i] * d, *minus = product + i * left;
      double* to = rest + i * d;  // in place: no entry moves down or to the right
      for (int64_t j = 0; j < left; ++j) to[j] = from[kept[j]] - minus[j];
    }
    for (int64_t i : picked) factor.order.push_back(index[i]);
    for (int64_t i = 0; i < left; ++i) index[i] = index[kept[i]];
    index.resize(left);
  }
  for (int64_t i = 0; i < int64_t(index.size()); ++i)
    for (int64_t j = 0; j < int64_t(index.size()); ++j)
      factor.remainder = std::max(factor.remainder, std::abs(rest[i * d + j]));
  factor.order.insert(factor.order.end(), index.begin(), index.end());
  return factor;
}

}  // namespace fastgan
