// The iterations of csrc/ on plain loops and std::vector, with no torch: for AddressSanitizer and UBSan (`make
// sanitize`). Each answer is known in closed form from the singular values that a matrix was built from.
#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "nuclear_norm.h"
#include "pivoted_cholesky.h"
#include "small_trace.h"
#include "sqrtm.h"

namespace {

using Values = std::vector<double>;

struct PlainDevice {
  template <typename T>
  struct Matrix {
    T* data;
    int64_t count, rows, cols;
    std::shared_ptr<std::vector<T>> memory;
  };

  template <typename T>
  Matrix<T> empty(int64_t count, int64_t rows, int64_t cols) {
    auto memory = std::make_shared<std::vector<T>>(count * rows * cols, T(NAN));
    return {memory->data(), count, rows, cols, memory};
  }

  template <typename T>
  void multiply(const Matrix<T>& a, const Matrix<T>& b, bool transpose_b, Matrix<T>& out) {
    const int64_t inner = transpose_b ? b.cols : b.rows;
    if (a.cols != inner || out.rows != a.rows || out.cols != (transpose_b ? b.rows : b.cols)) std::abort();
    if (out.data == a.data || out.data == b.data) std::abort();
    for (int64_t n = 0; n < a.count; ++n)
      for (int64_t i = 0; i < out.rows; ++i)
        for (int64_t j = 0; j < out.cols; ++j) {
          T sum = 0;
          for (int64_t k = 0; k < inner; ++k)
            sum += a.data[(n * a.rows + i) * a.cols + k] *
                   b.data[(n * b.rows + (transpose_b ? j : k)) * b.cols + (transpose_b ? k : j)];
          out.data[(n * out.rows + i) * out.cols + j] = sum;
        }
  }

  template <class F>
  void map(int64_t count, int64_t size, const F& f) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = size - 1; k >= 0; --k) f(i, k);
  }

  template <class F>
  void sum(int64_t count, int64_t size, const F& f, double* out) {
    for (int64_t i = 0; i < count; ++i) {
      double total = 0;
      for (int64_t k = 0; k < size; ++k) total += f(i, k);
      out[i] = total;
    }
  }

  bool finished(const double* flags, int64_t count) {
    return look && std::all_of(flags, flags + count, [](double flag) { return flag != 0; });
  }

  bool look = true;  // false within a graph
};

struct OneThread {
  int worker() const { return 0; }
  int workers() const { return 1; }
  int lane() const { return 0; }
  int lanes() const { return 1; }
  double sum(double x) const { return x; }
  void sync() const {}
};

std::mt19937 generator(0);

// a <- H a for a random Householder reflection H; a is rows x cols.
void reflect_rows(double* a, int64_t rows, int64_t cols, const Values& v, double norm) {
  for (int64_t j = 0; j < cols; ++j) {
    double dot = 0;
    for (int64_t i = 0; i < rows; ++i) dot += v[i] * a[i * cols + j];
    for (int64_t i = 0; i < rows; ++i) a[i * cols + j] -= 2 * dot / norm * v[i];
  }
}

Values random_vector(int64_t n, double* norm) {
  std::normal_distribution<double> normal;
  Values v(n);
  *norm = 0;
  for (double& x : v) {
    x = normal(generator);
    *norm += x * x;
  }
  return v;
}

// rows x cols with these singular values, in directions of its own; symmetric where asked for.
Values with_spectrum(const Values& sigma, int64_t rows, int64_t cols, bool symmetric) {
  Values a(rows * cols, 0), transposed(rows * cols);
  for (size_t i = 0; i < sigma.size(); ++i) a[i * cols + i] = sigma[i];
  for (int reflection = 0; reflection < 3; ++reflection) {
    double norm_left, norm_right;
    const Values left = random_vector(rows, &norm_left), right = random_vector(cols, &norm_right);
    reflect_rows(a.data(), rows, cols, left, norm_left);
    for (int64_t k = 0; k < rows * cols; ++k) transposed[(k % cols) * rows + k / cols] = a[k];
    reflect_rows(transposed.data(), cols, rows, symmetric ? left : right, symmetric ? norm_left : norm_right);
    for (int64_t k = 0; k < rows * cols; ++k) a[k] = transposed[(k % cols) * rows + k / cols];
  }
  return a;
}

int failures = 0;

void expect(const char* what, double found, double truth, double tolerance) {
  const double error = std::abs(found - truth) / std::max(std::abs(truth), 1e-300);
  const bool good = truth == 0 ? found == 0 : error <= tolerance;
  if (!good) ++failures;
  std::printf("%-4s %-40s %.15g, relative error %.1e\n", good ? "ok" : "FAIL", what, found, error);
}

double total(const Values& values) {
  double sum = 0;
  for (double value : values) sum += value;
  return sum;
}

void test_nuclear_norm(const std::vector<Values>& spectra, int64_t rows, int64_t cols, bool low, bool look) {
  PlainDevice device{look};
  const auto count = int64_t(spectra.size());
  auto m = device.empty<double>(count, rows, cols), u = device.empty<double>(count, rows, cols);
  auto report = device.empty<double>(1, count, fastgan::kReportColumns);
  for (int64_t n = 0; n < count; ++n) {
    const Values a = with_spectrum(spectra[n], rows, cols, false);
    std::copy(a.begin(), a.end(), m.data + n * rows * cols);
  }
  fastgan::PolarIteration<PlainDevice>(device, m, u, report, low ? 2e-6 : 1e-10).run(low);
  for (int64_t n = 0; n < count; ++n)
    expect(low ? "nuclear norm, float32 first" : look ? "nuclear norm" : "nuclear norm, as in a graph",
           report.data[n * fastgan::kReportColumns], total(spectra[n]), low ? 1e-7 : 1e-10);
}

void test_sqrtm(const Values& sigma, bool inverse) {
  PlainDevice device;
  const auto rows = int64_t(sigma.size());
  auto a = device.empty<double>(1, rows, rows), root = device.empty<double>(1, rows, rows);
  const Values values = with_spectrum(sigma, rows, rows, true);
  std::copy(values.begin(), values.end(), a.data);
  fastgan::coupled_newton_schulz(device, a, root, inverse);
  double trace = 0, truth = 0;
  for (int64_t i = 0; i < rows; ++i) {
    trace += root.data[i * rows + i];
    truth += inverse ? 1 / std::sqrt(sigma[i]) : std::sqrt(sigma[i]);
  }
  expect(inverse ? "inverse square root" : "square root", trace, truth, 1e-9);
}

template <typename T>
void test_small(const Values& sigma, bool definite) {
  const int d = int(sigma.size());
  Values wide = with_spectrum(sigma, d, d, true);
  if (!definite) wide[0] -= 2 * total(sigma);
  const std::vector<T> a(wide.begin(), wide.end());
  const auto workspace = std::make_unique<double[]>(fastgan::small_workspace(d));
  double result[3];
  OneThread group;
  fastgan::SmallTrace<OneThread, T>(group, d, workspace.get()).run(a.data(), a.data(), result);
  if (definite) expect("small trace", result[0], total(sigma), sizeof(T) == 4 ? 1e-6 : 1e-12);
  expect("small trace is semi-definite", result[2], definite, 0);
}

void test_pivoted(const Values& sigma, int64_t rank) {
  const auto d = int64_t(sigma.size());
  const Values a = with_spectrum(sigma, d, d, true);
  Values rows(d * d, 0), block(fastgan::kPivotBlock * d), current;
  const auto complement = [&](const double* rest, int64_t size, int64_t count, const std::vector<int64_t>& kept) {
    Values next;
    for (size_t i = 0; i < kept.size(); ++i)
      for (size_t j = 0; j < kept.size(); ++j) {
        next.push_back(rest[kept[i] * size + kept[j]]);
        for (int64_t k = 0; k < count; ++k) next.back() -= block[k * d + i] * block[k * d + j];
      }
    current = std::move(next);
    return static_cast<const double*>(current.data());
  };
  const fastgan::PivotedFactor factor = fastgan::pivoted_cholesky(a.data(), d, rows.data(), block.data(), complement);
  double worst = 0, largest = 0;
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) {
      double found = 0;
      for (int64_t k = 0; k < factor.rank; ++k) found += rows[k * d + i] * rows[k * d + j];
      worst = std::max(worst, std::abs(found - a[i * d + j]));
      largest = std::max(largest, std::abs(a[i * d + j]));
    }
  expect("rank by pivots", double(factor.rank), double(rank), 0);
  expect("factor by pivots", largest + worst, largest, 1e-14);
}

Values geometric(int64_t n, double last) {
  Values values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = std::pow(last, n == 1 ? 0.0 : double(i) / double(n - 1));
  return values;
}

}  // namespace

int main() {
  const Values singular{1, 0.5, 0.25, 0.1, 0, 0, 0};
  for (bool look : {true, false}) {
    test_nuclear_norm({geometric(7, 1e-8), Values(7, 0.3), singular, Values(7, 0)}, 7, 7, false, look);
    test_nuclear_norm({geometric(7, 1e-3), Values(7, 0.3), singular}, 7, 11, true, look);
  }
  test_nuclear_norm({geometric(33, 1e-8)}, 33, 33, false, true);
  test_nuclear_norm({{0.7}}, 1, 1, false, true);
  for (bool inverse : {false, true}) {
    test_sqrtm(geometric(9, 1e-4), inverse);
    test_sqrtm({0.7}, inverse);
  }
  for (int d : {1, 2, 3, 31, 64}) {
    test_small<double>(geometric(d, 1e-8), true);
    test_small<float>(geometric(d, 1e-2), true);
  }
  test_small<double>(singular, true);
  test_small<double>(Values(5, 0), true);
  test_small<double>(geometric(6, 1e-2), false);
  test_pivoted(geometric(150, 1e-6), 150);
  test_pivoted(singular, 4);
  test_pivoted(Values(5, 0), 0);
  test_pivoted({0.7}, 1);
  Values low_rank = geometric(100, 1e-4);
  low_rank.resize(200, 0);
  test_pivoted(low_rank, 100);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
