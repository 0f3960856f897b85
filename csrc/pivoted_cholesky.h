// Cholesky factor with complete pivoting of a symmetric positive semi-definite matrix, as in fastgan/linalg/_pivoted.py.
// In main memory, and without torch: the products are the caller's.
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

// row <- row - sum of factors[k] times the k-th of `count` rows, `stride` apart; four at a time, as each pass over `row`
// takes as long as the arithmetic of two.
inline void subtract_rows(double* row, int64_t size, const double* rows, int64_t stride, int64_t count,
                          const double* factors) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const double *r0 = rows + k * stride, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
    const double f0 = factors[k], f1 = factors[k + 1], f2 = factors[k + 2], f3 = factors[k + 3];
    for (int64_t i = 0; i < size; ++i) row[i] -= (f0 * r0[i] + f1 * r1[i]) + (f2 * r2[i] + f3 * r3[i]);
  }
  for (; k < count; ++k)
    for (int64_t i = 0; i < size; ++i) row[i] -= factors[k] * rows[k * stride + i];
}

// The next rows of the factor, at most kPivotBlock of them, to `block` with rows `stride` apart; `rest` is what is left,
// (size, size). Returns the positions of their pivots.
inline std::vector<int64_t> factor_pivot_block(const double* rest, int64_t size, double floor, double* block,
                                               int64_t stride) {
  std::vector<double> diagonal(size);
  for (int64_t i = 0; i < size; ++i) diagonal[i] = rest[i * size + i];
  std::vector<int64_t> picked;
  while (int64_t(picked.size()) < std::min(kPivotBlock, size)) {
    const int64_t pivot = std::max_element(diagonal.begin(), diagonal.end()) - diagonal.begin();
    if (!(diagonal[pivot] > floor)) break;
    const auto count = int64_t(picked.size());
    const double root = std::sqrt(diagonal[pivot]);
    double* row = block + count * stride;
    std::copy_n(rest + pivot * size, size, row);
    double factors[kPivotBlock];
    for (int64_t k = 0; k < count; ++k) factors[k] = block[k * stride + pivot];
    subtract_rows(row, size, block, stride, count, factors);
    for (int64_t i = 0; i < size; ++i) row[i] /= root;
    for (int64_t i : picked) row[i] = 0;
    row[pivot] = root;
    picked.push_back(pivot);
    for (int64_t i = 0; i < size; ++i) diagonal[i] -= row[i] * row[i];
    for (int64_t i : picked) diagonal[i] = -std::numeric_limits<double>::infinity();
  }
  return picked;
}

// Of (d, d) A. Rows of the factor go to the first rows of `rows`, of which all d x d are given and zero; `block` is room
// for kPivotBlock rows of d. complement(rest, size, count, kept) returns the kept rows and columns of `rest`, (size, size),
// less block^T block, where the first `count` rows of `block` have their kept columns in front by then.
template <class Complement>
PivotedFactor pivoted_cholesky(const double* a, int64_t d, double* rows, double* block, Complement&& complement) {
  const double floor = pivot_floor(a, d);
  PivotedFactor factor{0, {}, 0};
  const double* rest = a;
  std::vector<int64_t> index(d);
  std::iota(index.begin(), index.end(), 0);
  while (!index.empty()) {
    const auto size = int64_t(index.size());
    const std::vector<int64_t> picked = factor_pivot_block(rest, size, floor, block, d);
    if (picked.empty()) break;
    std::vector<bool> left(size, true);
    for (int64_t i : picked) {
      left[i] = false;
      factor.order.push_back(index[i]);
    }
    std::vector<int64_t> kept;
    for (int64_t i = 0; i < size; ++i)
      if (left[i]) kept.push_back(i);
    for (int64_t k = 0; k < int64_t(picked.size()); ++k) {
      double *from = block + k * d, *to = rows + factor.rank++ * d;
      for (int64_t i = 0; i < size; ++i) to[index[i]] = from[i];
      for (int64_t i = 0; i < int64_t(kept.size()); ++i) from[i] = from[kept[i]];
    }
    rest = complement(rest, size, int64_t(picked.size()), kept);
    for (int64_t& i : kept) i = index[i];
    index = kept;
  }
  const auto size = int64_t(index.size());
  for (int64_t i = 0; i < size * size; ++i) factor.remainder = std::max(factor.remainder, std::abs(rest[i]));
  factor.order.insert(factor.order.end(), index.begin(), index.end());
  return factor;
}

}  // namespace fastgan
