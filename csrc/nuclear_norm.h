// ||M||_* = <U, M> by the polar factor U of M, from matrix products alone. Does not depend on torch: see iteration.h.
//
// Any U with ||U||_2 <= 1 gives <U, M> <= ||M||_*, with equality at the polar factor, where the value is stationary: an
// error e in U costs O(e^2). With H = M U^T, M = H U + R and K the skew part of H,
//   ||M||_* <= ||H||_* + sqrt(m) |R|_F <= tr(H) + sqrt(m) (|K|_F + |R|_F)     if H + H^T is semi-definite.
// polar_factor in fastgan/linalg/_nuclear_norm.py takes the same steps.
#pragma once

#include "iteration.h"

namespace fastgan {

// Columns of the report.
enum { kValue = 0, kError = 1, kIterations = 2, kReportColumns = 3 };

struct Product {
  const double* a;
  const double* b;
  int64_t size;
  FASTGAN_HD double operator()(int64_t i, int64_t k) const { return a[i * size + k] * b[i * size + k]; }
};

// The squared entries of (H - H^T) / 2.
struct SquaredSkew {
  const double* h;
  int64_t rows;
  FASTGAN_HD double operator()(int64_t i, int64_t k) const {
    const double* matrix = h + i * rows * rows;
    const double skew = 0.5 * (matrix[k] - matrix[(k % rows) * rows + k / rows]);
    return skew * skew;
  }
};

// scale <- (sum of the squared entries of M M^T)^{1/4}, which is at least ||M||_2 and closer to it than |M|_F.
struct FourthRoot {
  double* scale;
  FASTGAN_HD void operator()(int64_t i, int64_t) const { scale[i] = sqrt(sqrt(scale[i])) * (1 + 1e-12); }
};

struct Report {
  double* report;
  double* done;
  const double* value;
  const double* residual;
  const double* skew;
  double rows, tolerance;
  FASTGAN_HD void operator()(int64_t i, int64_t) const {
    const double error = sqrt(rows) * (sqrt(residual[i]) + sqrt(skew[i]));
    report[i * kReportColumns + kValue] = value[i];
    report[i * kReportColumns + kError] = error;
    if (error <= tolerance * value[i]) done[i] = 1;
  }
};

struct CountIterations {
  double* report;
  const double* done;
  double steps;
  FASTGAN_HD void operator()(int64_t i, int64_t) const {
    if (done[i] == 0) report[i * kReportColumns + kIterations] += steps;
  }
};

// The polar factor of each (rows, cols) matrix of a batch, rows <= cols, entries of magnitude about 1 or below.
template <class Device>
class PolarIteration {
 public:
  template <typename T>
  using Matrix = typename Device::template Matrix<T>;

  // `u` receives the factors; `report`, (count, kReportColumns), the value, an error estimate and the iterations.
  PolarIteration(Device& device, Matrix<double> m, Matrix<double> u, Matrix<double> report, double tolerance)
      : device_(device), m_(m), u_(u), report_(report), tolerance_(tolerance), rows_(m.rows), size_(m.rows * m.cols),
        scale_(device.template empty<double>(1, 1, m.count)), done_(device.template empty<double>(1, 1, m.count)),
        terms_(device.template empty<double>(3, 1, m.count)) {}

  // One pass resolves singular values down to 1e-7 of the largest, a second one down to about 1e-14. A float32 pass
  // goes first if `low_precision` asks for it. Each pass skips matrices that are done. If the host may read the flags,
  // the work ends once all matrices are done.
  void run(bool low_precision) {
    auto gram = device_.template empty<double>(m_.count, rows_, rows_);
    auto product = device_.template empty<double>(m_.count, rows_, m_.cols);
    fill(done_.data, 0);
    device_.map(m_.count, kReportColumns, Fill{report_.data, kReportColumns, 0});
    measure_scale(gram);
    if (low_precision) {
      low_precision_pass();
      iterate(u_, gram, product, {kNewtonSchulz, kNewtonSchulz});
      measure(gram, product);
      if (device_.finished(done_.data, m_.count)) return;
    }
    device_.map(m_.count, size_, Scale<double, double>{m_.data, u_.data, scale_.data, done_.data, size_});
    for (int pass = 0; pass < kPasses; ++pass) {
      iterate(u_, gram, product, scaled_newton_schulz(kSmallest));
      measure(gram, product);
      if (device_.finished(done_.data, m_.count)) return;
    }
  }

 private:
  static constexpr int kPasses = 2;
  static constexpr double kSmallest = 1e-7;

  void fill(double* out, double value) { device_.map(m_.count, 1, Fill{out, 1, value}); }

  void measure_scale(Matrix<double>& gram) {
    device_.multiply(m_, m_, true, gram);
    device_.sum(m_.count, rows_ * rows_, SquareOf{gram.data, rows_ * rows_}, scale_.data);
    device_.map(m_.count, 1, FourthRoot{scale_.data});
  }

  void low_precision_pass() {
    auto x = device_.template empty<float>(m_.count, rows_, m_.cols);
    auto gram = device_.template empty<float>(m_.count, rows_, rows_);
    auto product = device_.template empty<float>(m_.count, rows_, m_.cols);
    device_.map(m_.count, size_, Scale<double, float>{m_.data, x.data, scale_.data, done_.data, size_});
    iterate(x, gram, product, scaled_newton_schulz(kSmallest));
    auto one = device_.template empty<double>(1, 1, m_.count);
    fill(one.data, 1);
    device_.map(m_.count, size_, Scale<float, double>{x.data, u_.data, one.data, done_.data, size_});
  }

  template <typename T>
  void iterate(Matrix<T>& x, Matrix<T>& gram, Matrix<T>& product, const std::vector<Step>& steps) {
    device_.map(m_.count, 1, CountIterations{report_.data, done_.data, double(steps.size())});
    for (const Step& step : steps) {
      device_.multiply(x, x, true, gram);
      device_.multiply(gram, x, false, product);
      device_.map(m_.count, size_,
                  Combine<T>{x.data, product.data, done_.data, size_, T(step.linear), T(step.cubic)});
    }
  }

  void measure(Matrix<double>& gram, Matrix<double>& product) {
    double* value = terms_.data;
    double* residual = value + m_.count;
    double* skew = residual + m_.count;
    device_.multiply(m_, u_, true, gram);
    device_.multiply(gram, u_, false, product);
    device_.sum(m_.count, size_, Product{m_.data, u_.data, size_}, value);
    device_.sum(m_.count, size_, SquaredDifference{m_.data, product.data, size_}, residual);
    device_.sum(m_.count, rows_ * rows_, SquaredSkew{gram.data, rows_}, skew);
    device_.map(m_.count, 1, Report{report_.data, done_.data, value, residual, skew, double(rows_), tolerance_});
  }

  Device& device_;
  Matrix<double> m_, u_, report_;
  double tolerance_;
  int64_t rows_, size_;
  Matrix<double> scale_, done_, terms_;
};

}  // namespace fastgan
