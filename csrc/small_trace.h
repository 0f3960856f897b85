// tr((A B)^{1/2}) of one pair of small matrices by one group of threads: pivoted Cholesky factors of both, then the
// singular values of their product by one-sided Jacobi rotations, all in the group's memory. No torch here.
//
// A Group has: worker() of workers(), each of which handles a pair of columns; lane() of lanes() within a worker;
// sum(x), over the lanes; sync(), of all. The CPU's has one worker of one lane. The same lines run on both.
#pragma once

#include <cfloat>

#include "iteration.h"

namespace fastgan {

constexpr int kLargestSmall = 64;
constexpr double kIndefiniteShare = 1e-5;  // the value in fastgan/linalg/_symmetric.py

// Doubles of memory that a group needs for matrices of d rows.
FASTGAN_HD inline int64_t small_workspace(int64_t d) { return 3 * d * d + d + 2; }

template <class Group, typename T>
class SmallTrace {
 public:
  FASTGAN_HD SmallTrace(Group& group, int d, double* workspace)
      : group_(group), d_(d), f_(workspace), g_(workspace + d * d), work_(workspace + 2 * d * d),
        norms_(workspace + 3 * d * d), flags_(norms_ + d), thread_(group.worker() * group.lanes() + group.lane()),
        threads_(group.workers() * group.lanes()) {}

  // value, error bound, and whether both are semi-definite (1) or not (0), to three doubles.
  FASTGAN_HD void run(const T* a, const T* b, double* result) {
    const double scale_a = factor(a, f_), scale_b = factor(b, g_);
    const bool definite = scale_a >= 0 && scale_b >= 0;
    multiply();
    rotate();
    for (int c = thread_; c < d_; c += threads_) {
      double square = 0;
      for (int i = 0; i < d_; ++i) square += work_[c * d_ + i] * work_[c * d_ + i];
      norms_[c] = sqrt(square);
    }
    group_.sync();
    if (thread_ == 0) {
      double value = 0, squares = 0;
      for (int c = 0; c < d_; ++c) {
        value += norms_[c];
        squares += norms_[c] * norms_[c];
      }
      const double scale = definite ? sqrt(scale_a) * sqrt(scale_b) : NAN;
      result[0] = value * scale;
      result[1] = 4 * DBL_EPSILON * d_ * sqrt(squares) * scale;
      result[2] = definite;
    }
  }

 private:
  // Columns F with A = scale F F^T, the largest remaining diagonal entry first; returns the scale, a power of two, or
  // -1 if the remainder shows that A has a negative eigenvalue. Pivots at rounding level count as zero.
  FASTGAN_HD double factor(const T* a, double* f) {
    double largest = 0;
    for (int i = 0; i < d_; ++i) largest = fmax(largest, double(a[i * d_ + i]));
    int exponent = 0;
    frexp(largest, &exponent);
    const double scale = largest > 0 ? ldexp(1.0, exponent - 1) : 1;
    for (int k = thread_; k < d_ * d_; k += threads_) {
      const double entry = a[k], mirrored = a[(k % d_) * d_ + k / d_];
      work_[k] = 0.5 * (entry / scale + mirrored / scale);
      f[k] = 0;
    }
    if (thread_ == 0) flags_[0] = 0;
    group_.sync();
    const double floor = d_ * DBL_EPSILON * (largest / scale);
    for (int c = 0; c < d_; ++c) {
      int pivot = 0;
      for (int i = 1; i < d_; ++i)
        if (work_[i * d_ + i] > work_[pivot * d_ + pivot]) pivot = i;
      const double square = work_[pivot * d_ + pivot];
      if (!(square > floor)) break;
      const double root = sqrt(square);
      for (int i = thread_; i < d_; i += threads_) f[c * d_ + i] = work_[i * d_ + pivot] / root;
      group_.sync();
      for (int k = thread_; k < d_ * d_; k += threads_) {
        const int i = k / d_, j = k % d_;
        work_[k] = i == pivot || j == pivot ? 0 : work_[k] - f[c * d_ + i] * f[c * d_ + j];
      }
      group_.sync();
    }
    for (int k = thread_; k < d_ * d_; k += threads_)
      if (!(fabs(work_[k]) <= kIndefiniteShare * (largest / scale))) flags_[0] = 1;
    group_.sync();
    const bool indefinite = flags_[0] != 0;
    group_.sync();
    return indefinite ? -1 : scale;
  }

  // work <- F^T G, stored by columns: column c is F^T times column c of G.
  FASTGAN_HD void multiply() {
    for (int k = thread_; k < d_ * d_; k += threads_) {
      const double* column = g_ + (k / d_) * d_;
      const double* row = f_ + (k % d_) * d_;
      double sum = 0;
      for (int i = 0; i < d_; ++i) sum += row[i] * column[i];
      work_[k] = sum;
    }
    group_.sync();
  }

  // Sweeps of rotations over all pairs of columns until a sweep finds them orthogonal. In round r of a tournament of n
  // players, n - 1 stays and meets r; r + k meets r - k, modulo n - 1.
  FASTGAN_HD void rotate() {
    constexpr int kSweeps = 40;
    const int players = d_ + d_ % 2;
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      if (thread_ == 0) flags_[1] = 0;
      group_.sync();
      for (int round = 0; round < players - 1; ++round) {
        for (int k = group_.worker(); k < players / 2; k += group_.workers()) {
          const int p = (round + k) % (players - 1);
          const int q = k == 0 ? players - 1 : (round - k + players - 1) % (players - 1);
          if (p < d_ && q < d_ && rotate_pair(work_ + p * d_, work_ + q * d_) && group_.lane() == 0) flags_[1] = 1;
        }
        group_.sync();
      }
      const bool rotated = flags_[1] != 0;
      group_.sync();
      if (!rotated) return;
    }
  }

  // Makes two columns orthogonal; returns false if they already were.
  FASTGAN_HD bool rotate_pair(double* x, double* y) {
    double xx = 0, yy = 0, xy = 0;
    for (int i = group_.lane(); i < d_; i += group_.lanes()) {
      xx += x[i] * x[i];
      yy += y[i] * y[i];
      xy += x[i] * y[i];
    }
    xx = group_.sum(xx);
    yy = group_.sum(yy);
    xy = group_.sum(xy);
    if (!(fabs(xy) > DBL_EPSILON * d_ * sqrt(xx) * sqrt(yy))) return false;
    const double zeta = (yy - xx) / (2 * xy);
    const double t = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
    const double c = 1 / sqrt(1 + t * t), s = c * t;
    for (int i = group_.lane(); i < d_; i += group_.lanes()) {
      const double u = x[i], v = y[i];
      x[i] = c * u - s * v;
      y[i] = s * u + c * v;
    }
    return true;
  }

  Group& group_;
  int d_;
  double *f_, *g_, *work_, *norms_, *flags_;
  int thread_, threads_;
};

}  // namespace fastgan
