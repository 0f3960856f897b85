#include "trace_sqrt_product.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "aten.h"

namespace fastgan {
namespace {

using torch::headeronly::ScalarType;

// As in fastgan/reference/trace_sqrt_product.py.
enum Method : int64_t { kFailed = -1, kCholesky = 0, kEigh = 1, kSvd = 2, kAuto = 3 };
constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr double kNoise = 4 * kEpsilon;
constexpr double kIndefinite = 1e-5;

struct Result {
  double value = std::numeric_limits<double>::quiet_NaN();
  double bound = std::numeric_limits<double>::infinity();
  Method method = kFailed;
};

// The power of two at or below the largest magnitude: dividing by it is exact.
double power_of_two_scale(double largest) {
  if (!(largest > 0)) return 1;
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, exponent - 1);
}

double frobenius_norm(const std::vector<double>& values) {
  return std::sqrt(std::inner_product(values.begin(), values.end(), values.begin(), 0.0));
}

// What is known of F with F F^T = A + E: |E|, and a lower bound of the smallest eigenvalue that F keeps.
struct Quality {
  double noise = 0, smallest = 0;
};

// One operand: its matrices, scaled when first asked for, and each factored at most once.
class Operand {
 public:
  Operand(const Primitives& primitives, const Tensor& matrices)
      : primitives_(primitives), matrices_(matrices), size_(matrices.size(1)), entries_(matrices.size(0)) {}

  double scale(int64_t i) { return entry(i).scale; }
  const Tensor& matrix(int64_t i) { return *entry(i).matrix; }

  // Lower Cholesky factor, or nothing where the matrix is not positive definite.
  const std::optional<Tensor>& cholesky(int64_t i) {
    Entry& e = entry(i);
    if (!e.cholesky_tried) {
      e.cholesky_tried = true;
      e.cholesky = factor(*e.matrix);
    }
    return e.cholesky;
  }

  // (d, r) factor F with F F^T = A from the r eigenvalues above rounding, or nothing where A is clearly indefinite.
  const std::optional<Tensor>& eigen_factor(int64_t i) {
    Entry& e = entry(i);
    if (!e.eigh_tried) {
      e.eigh_tried = true;
      auto [values, vectors] = aten::eigh(*e.matrix);
      const std::vector<double> host = primitives_.to_host(values);
      const double largest = std::max(std::abs(host.front()), std::abs(host.back()));
      if (host.front() >= -kIndefinite * largest) {
        const double floor = size_ * kEpsilon * largest;
        const int64_t skip = std::upper_bound(host.begin(), host.end(), floor) - host.begin();
        const double smallest = skip < size_ ? host[skip] : std::numeric_limits<double>::infinity();
        e.eigen_quality = {kNoise * frobenius_norm(host), smallest};
        Tensor kept_values = torch::stable::narrow(values, 0, skip, size_ - skip);
        Tensor kept_vectors = torch::stable::narrow(vectors, 1, skip, size_ - skip);
        e.eigen_factor = aten::mul(kept_vectors, aten::sqrt(kept_values));
      }
    }
    return e.eigen_factor;
  }

  const Quality& eigen_quality(int64_t i) { return entry(i).eigen_quality; }

  // Of the Cholesky factor, which must be there: the smallest eigenvalue is at least 1 / |L^{-1}|^2.
  const Quality& cholesky_quality(int64_t i) {
    Entry& e = entry(i);
    if (e.cholesky_quality.smallest == 0) {
      Tensor eye = torch::stable::new_zeros(*e.matrix, {size_, size_});
      Tensor diagonal = aten::diagonal(eye);
      torch::stable::fill_(diagonal, 1);
      const Tensor inverse = torch::stable::flatten(aten::solve_lower(*e.cholesky, eye));
      e.cholesky_quality = {kNoise * trace(i), 1 / scalar(aten::dot(inverse, inverse))};
    }
    return e.cholesky_quality;
  }

  // How far from tr((A B)^{1/2}) a factor of this quality may take `value`: as in the reference.
  double factor_error(int64_t i, const Quality& quality, double value, Operand& other, int64_t j) {
    const double trace = other.trace(j), product_error = kNoise * std::sqrt(this->trace(i) * trace);
    return quality.noise * std::min(0.5 * value / quality.smallest, std::sqrt(trace / quality.smallest)) + product_error;
  }

  double trace(int64_t i) {
    const std::vector<double> diagonal = primitives_.to_host(aten::diagonal(matrix(i)));
    return std::max(0.0, std::accumulate(diagonal.begin(), diagonal.end(), 0.0));
  }

  // False where A has an eigenvalue clearly below zero, by one Cholesky factorisation of A + tolerance I.
  bool semidefinite(int64_t i) {
    Entry& e = entry(i);
    Tensor shift = torch::stable::new_zeros(*e.matrix, {size_, size_});
    Tensor diagonal = aten::diagonal(shift);
    torch::stable::fill_(diagonal, kIndefinite);
    return factor(aten::add(*e.matrix, shift)).has_value();
  }

 private:
  struct Entry {
    std::optional<Tensor> matrix, cholesky, eigen_factor;
    Quality cholesky_quality, eigen_quality;
    double scale = 1;
    bool cholesky_tried = false, eigh_tried = false;
  };

  Entry& entry(int64_t i) {
    Entry& e = entries_[i];
    if (!e.matrix) {
      Tensor a = torch::stable::select(matrices_, 0, i);
      e.scale = power_of_two_scale(std::max(scalar(aten::max(a)), -scalar(aten::min(a))));
      e.matrix = primitives_.symmetrized(a, e.scale);
    }
    return e;
  }

  std::optional<Tensor> factor(const Tensor& matrix) {
    auto [lower, info] = aten::cholesky_ex(matrix);
    if (scalar(info) != 0) return std::nullopt;
    return lower;
  }

  double scalar(const Tensor& value) { return primitives_.to_host(torch::stable::unsqueeze(value, 0)).front(); }

  const Primitives& primitives_;
  Tensor matrices_;
  int64_t size_;
  std::vector<Entry> entries_;
};

// Sum of sqrt(eigenvalues), with a bound on what the eigensolver's error E does to it: <E, G^{-1/2}> / 2, by
// Cauchy-Schwarz at most |E| |G^{-1/2}| / 2 in Frobenius norms, where an eigenvalue stands above |E|, and sqrt(|E|)
// where it does not.
Result from_gram_eigenvalues(const std::vector<double>& eigenvalues, double tolerance, Method method, bool* accurate) {
  const double noise = kNoise * frobenius_norm(eigenvalues);
  double value = 0, inverses = 0, unresolved = 0;
  for (double eigenvalue : eigenvalues) {
    value += std::sqrt(std::max(eigenvalue, 0.0));
    if (eigenvalue > 4 * noise)
      inverses += 1 / eigenvalue;
    else
      unresolved += std::sqrt(noise + std::max(eigenvalue, 0.0));
  }
  const double bound = noise * std::sqrt(inverses) / 2 + unresolved;
  *accurate = eigenvalues.front() >= -noise && bound <= tolerance * value;
  return {value, bound, method};
}

Result from_singular_values(const std::vector<double>& singular) {
  const double value = std::accumulate(singular.begin(), singular.end(), 0.0);
  return {value, kNoise * frobenius_norm(singular) * std::sqrt(double(singular.size())), kSvd};
}

// By singular values of the product of both Cholesky factors, or nothing where these are not accurate enough to give
// `value`, which is about the result.
std::optional<Result> from_cholesky_factors(const Primitives& primitives, Operand& a, Operand& b, int64_t i, int64_t j,
                                            double value, double tolerance) {
  const auto &f = a.cholesky(i), &g = b.cholesky(j);
  if (!g) return std::nullopt;
  const double error = a.factor_error(i, a.cholesky_quality(i), value, b, j) +
                       b.factor_error(j, b.cholesky_quality(j), value, a, i);
  if (!(error <= 0.5 * tolerance * value)) return std::nullopt;
  const Tensor product = torch::stable::matmul(torch::stable::transpose(*f, 0, 1), *g);
  Result result = from_singular_values(primitives.to_host(aten::svdvals(product)));
  result.bound += error;
  return result;
}

// By eigenvalues of F^T Y F with the factor by eigenvectors of X = F F^T, or nothing where their error bound is too wide.
std::optional<Result> from_eigen_factor(const Primitives& primitives, Operand& x, Operand& y, int64_t i, int64_t j,
                                        double tolerance) {
  const auto& f = x.eigen_factor(i);
  if (!f || !y.semidefinite(j)) return Result{};
  if (f->size(1) == 0) return Result{0, 0, kEigh};
  const Tensor f_transposed = torch::stable::transpose(*f, 0, 1);
  const Tensor gram = torch::stable::matmul(torch::stable::matmul(f_transposed, y.matrix(j)), *f);
  bool accurate = false;
  Result result = from_gram_eigenvalues(primitives.to_host(aten::eigvalsh(gram)), tolerance, kEigh, &accurate);
  result.bound += x.factor_error(i, x.eigen_quality(i), result.value, y, j);
  return accurate ? std::optional(result) : std::nullopt;
}

Result from_eigen_factors(const Primitives& primitives, Operand& a, Operand& b, int64_t i, int64_t j) {
  const auto &f = a.eigen_factor(i), &g = b.eigen_factor(j);
  if (!f || !g) return {};
  if (f->size(1) == 0 || g->size(1) == 0) return {0, 0, kEigh};
  const Tensor product = torch::stable::matmul(torch::stable::transpose(*f, 0, 1), *g);
  Result result = from_singular_values(primitives.to_host(aten::svdvals(product)));
  result.bound += a.factor_error(i, a.eigen_quality(i), result.value, b, j);
  result.bound += b.factor_error(j, b.eigen_quality(j), result.value, a, i);
  return result;
}

Result solve(const Primitives& primitives, Operand& a, Operand& b, int64_t i, int64_t j, int64_t method,
             double tolerance) {
  std::optional<Result> found;
  if (method == kAuto || method == kCholesky) {
    if (const auto& lower = a.cholesky(i)) {
      const Tensor gram = primitives.triangular_sandwich(*lower, b.matrix(j));
      bool accurate = false;
      const std::vector<double> eigenvalues = primitives.to_host(aten::eigvalsh(gram));
      const Result result = from_gram_eigenvalues(eigenvalues, tolerance, kCholesky, &accurate);
      if (accurate) return result;
      if (method == kCholesky) return b.semidefinite(j) ? result : Result{};
      found = from_cholesky_factors(primitives, a, b, i, j, result.value, tolerance);
      if (!found) found = from_eigen_factor(primitives, b, a, j, i, tolerance);  // it is B that may be singular
    } else if (method == kCholesky) {
      return {};
    } else {
      found = from_eigen_factor(primitives, a, b, i, j, tolerance);
    }
  } else if (method == kEigh) {
    found = from_eigen_factor(primitives, a, b, i, j, tolerance);
  }
  return found ? *found : from_eigen_factors(primitives, a, b, i, j);
}

}  // namespace

Tensor trace_sqrt_products(const Primitives& primitives, const Tensor& a, const Tensor& b, const Tensor& pairs,
                           int64_t method) {
  const int64_t count = pairs.size(0);
  Tensor rows = torch::stable::new_empty(pairs, {count, 3}, ScalarType::Double);
  const double tolerance = a.scalar_type() == ScalarType::Float ? 1e-7 : 1e-9;
  Operand left(primitives, a), right(primitives, b);
  const auto* index = static_cast<const int64_t*>(pairs.data_ptr());
  auto* out = static_cast<double*>(rows.data_ptr());
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = index[2 * n], j = index[2 * n + 1];
    const Result result = solve(primitives, left, right, i, j, method, tolerance);
    // Two factors: the product of the scales may leave the range where the value does not.
    const double scale_a = std::sqrt(left.scale(i)), scale_b = std::sqrt(right.scale(j));
    out[3 * n] = result.value * scale_a * scale_b;
    out[3 * n + 1] = result.bound * scale_a * scale_b;
    out[3 * n + 2] = result.method;
  }
  return rows;
}

}  // namespace fastgan
