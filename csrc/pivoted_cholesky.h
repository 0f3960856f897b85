// Cholesky factor with complete pivoting of a symmetric positive semi-definite matrix, as in
// fastgan/linalg/_pivoted.py. Works on main memory and does not depend on torch; the caller computes the products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace fastgan {

constexpr int64_t kPivotBlock = 64;
// Pivots and eigenvalues up to d times this share of the largest entry or eigenvalue count as zero.
constexpr double kRounding = 4 * std::numeric_limits<double>::epsilon();

struct PivotedFactor {
  int64_t rank;
  std::vector<int64_t> order;  // the pivots, then the remaining rows
  double remainder;            // largest magnitude of the remaining matrix
};

// Pivots up to this are rounding errors.
inline double pivot_floor(const double* a, int64_t d) {
  double largest = 0;
  for (int64_t i = 0; i < d; ++i) largest = std::max(largest, a[i * d + i]);
  return double(d) * kRounding * largest;
}

// row <- row - the sum over k of factors[k] times the k-th of `count` rows, `stride` apart. Takes four rows at a time,
// since a pass over `row` takes as long as the arithmetic of two.
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

// Writes the next rows of the factor, at most kPivotBlock, to `block` with rows `stride` apart. `rest`, (size, size),
// is the remaining matrix. Returns the positions of the pivots.
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

// Factors A (d, d). Writes the factor to the first rows of `rows`, which is (d, d) and zero before; `block` has room for
// kPivotBlock rows of d. complement(rest, size, count, kept) returns the kept rows and columns of `rest`, (size, size),
// minus block^T block; by then the kept columns are in front in the first `count` rows of `block`.
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
