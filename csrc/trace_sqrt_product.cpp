#include "trace_sqrt_product.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "aten.h"
#include "pivoted_cholesky.h"

namespace fastgan {
namespace {

using torch::headeronly::ScalarType;

// As in fastgan/reference/trace_sqrt_product.py.
enum Method : int64_t { kFailed = -1, kCholesky = 0, kPivoted = 1, kEigh = 2, kSvd = 3, kAuto = 4 };
constexpr double kNoise = 4 * std::numeric_limits<double>::epsilon();
constexpr double kIndefinite = 1e-5;

struct Result {
  double value = std::numeric_limits<double>::quiet_NaN();
  double bound = std::numeric_limits<double>::infinity();
  Method method = kFailed;
};

double frobenius_norm(const std::vector<double>& values) {
  return std::sqrt(std::inner_product(values.begin(), values.end(), values.begin(), 0.0));
}

// What is known of F with F F^T = A + E: |E|, and a lower bound of the smallest eigenvalue that F keeps.
struct Quality {
  double noise = 0, smallest = 0;
};

struct [[gnu::visibility("hidden")]] Factor : FactorRows {
  Quality quality;
  Method method;
};

// One operand: its matrices, scaled when first asked for, and each factored at most once.
class Operand {
 public:
  Operand(const Primitives& primitives, const Tensor& matrices)
      : primitives_(primitives), matrices_(matrices), size_(matrices.size(1)), entries_(matrices.size(0)) {}

  double scale(int64_t i) { return entry(i).scale; }
  const Tensor& matrix(int64_t i) { return *entry(i).matrix; }

  // Lower Cholesky factor, or null where the matrix is not positive definite.
  const Tensor* cholesky(int64_t i) {
    Entry& e = entry(i);
    if (!e.cholesky_tried) {
      e.cholesky_tried = true;
      e.cholesky = cholesky_factor(*e.matrix);
    }
    return e.cholesky ? &*e.cholesky : nullptr;
  }

  // The factor of a singular matrix that `method` takes, or null where there is none: by pivoted Cholesky, else, but for
  // kPivoted, by eigenvectors. Not for kCholesky.
  const Factor* factor(int64_t i, Method method) {
    Entry& e = entry(i);
    if (method != kEigh && primitives_.pivoted_cholesky) {
      if (!e.pivoted_tried) e.pivoted = pivoted_factor(*e.matrix, i);
      e.pivoted_tried = true;
      if (e.pivoted) return &*e.pivoted;
    }
    if (method == kPivoted) return nullptr;
    if (!e.eigen_tried) e.eigen = eigen_factor(*e.matrix);
    e.eigen_tried = true;
    return e.eigen ? &*e.eigen : nullptr;
  }

  // Of the Cholesky factor, which must be there: the smallest eigenvalue is at least 1 / |L^{-1}|^2.
  const Quality& cholesky_quality(int64_t i) {
    Entry& e = entry(i);
    if (e.cholesky_quality.smallest == 0) e.cholesky_quality = triangular_quality(*e.cholesky, i);
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
    const Tensor shifted = torch::stable::clone(matrix(i));
    Tensor diagonal = aten::diagonal(shifted);
    Tensor shift = torch::stable::new_empty(diagonal, {size_});
    torch::stable::fill_(shift, kIndefinite);
    torch::stable::copy_(diagonal, aten::add(diagonal, shift));
    return cholesky_factor(shifted).has_value();
  }

 private:
  struct Entry {
    std::optional<Tensor> matrix, cholesky;
    std::optional<Factor> pivoted, eigen;
    Quality cholesky_quality;
    double scale = 1;
    bool cholesky_tried = false, pivoted_tried = false, eigen_tried = false;
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

  // Of the columns of the pivots, which make a square; the rest of the rows can but add to the eigenvalues.
  std::optional<Factor> pivoted_factor(const Tensor& matrix, int64_t i) {
    auto found = primitives_.pivoted_cholesky(matrix);
    if (!found) return std::nullopt;
    const Tensor pivots = torch::stable::narrow(*found->order, 0, 0, found->rows.size(0));
    const Tensor upper = aten::index_select(found->rows, 1, pivots);
    return Factor{*found, triangular_quality(torch::stable::transpose(upper, 0, 1), i), kPivoted};
  }

  // From the eigenvalues above rounding, or nothing where A is clearly indefinite.
  std::optional<Factor> eigen_factor(const Tensor& matrix) {
    auto [values, vectors] = aten::eigh(matrix);
    const std::vector<double> host = primitives_.to_host(values);
    const double largest = std::max(std::abs(host.front()), std::abs(host.back()));
    if (host.front() < -kIndefinite * largest) return std::nullopt;
    const int64_t skip = std::upper_bound(host.begin(), host.end(), double(size_) * kRounding * largest) - host.begin();
    const double smallest = skip < size_ ? host[skip] : std::numeric_limits<double>::infinity();
    Tensor kept_values = torch::stable::narrow(values, 0, skip, size_ - skip);
    Tensor kept_vectors = torch::stable::narrow(vectors, 1, skip, size_ - skip);
    const Tensor columns = aten::mul(kept_vectors, aten::sqrt(kept_values));
    return Factor{{torch::stable::transpose(columns, 0, 1), {}}, {kNoise * frobenius_norm(host), smallest}, kEigh};
  }

  // Of a factor of A that is lower triangular in some rows: the smallest eigenvalue is at least 1 / |L^{-1}|^2.
  Quality triangular_quality(const Tensor& lower, int64_t i) {
    if (lower.size(0) == 0) return {kNoise * trace(i), std::numeric_limits<double>::infinity()};
    const Tensor inverse = torch::stable::flatten(aten::solve_lower(lower, identity(lower.size(0))));
    return {kNoise * trace(i), 1 / scalar(aten::dot(inverse, inverse))};
  }

  Tensor identity(int64_t size) {
    Tensor out = torch::stable::new_zeros(matrices_, {size, size}, ScalarType::Double);
    Tensor diagonal = aten::diagonal(out);
    torch::stable::fill_(diagonal, 1);
    return out;
  }

  std::optional<Tensor> cholesky_factor(const Tensor& matrix) {
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
  const Tensor *f = a.cholesky(i), *g = b.cholesky(j);
  if (!g) return std::nullopt;
  const double error = a.factor_error(i, a.cholesky_quality(i), value, b, j) +
                       b.factor_error(j, b.cholesky_quality(j), value, a, i);
  if (!(error <= 0.5 * tolerance * value)) return std::nullopt;
  const Tensor product = torch::stable::matmul(torch::stable::transpose(*f, 0, 1), *g);
  Result result = from_singular_values(primitives.to_host(aten::svdvals(product)));
  result.bound += error;
  return result;
}

Tensor gram(const Primitives& primitives, const Factor& factor, const Tensor& y) {
  if (!factor.order)
    return torch::stable::matmul(torch::stable::matmul(factor.rows, y), torch::stable::transpose(factor.rows, 0, 1));
  const Tensor upper = aten::index_select(factor.rows, 1, *factor.order);
  return primitives.triangular_sandwich(torch::stable::transpose(upper, 0, 1), primitives.reordered(y, *factor.order));
}

// By eigenvalues of F^T Y F with a factor of X = F F^T, or nothing where their error bound is too wide.
std::optional<Result> from_one_factor(const Primitives& primitives, Operand& x, Operand& y, int64_t i, int64_t j,
                                      Method method, double tolerance) {
  const Factor* f = x.factor(i, method);
  if (!f || !y.semidefinite(j)) return Result{};
  if (f->rows.size(0) == 0) return Result{0, 0, f->method};
  bool accurate = false;
  const std::vector<double> eigenvalues = primitives.to_host(aten::eigvalsh(gram(primitives, *f, y.matrix(j))));
  Result result = from_gram_eigenvalues(eigenvalues, tolerance, f->method, &accurate);
  result.bound += x.factor_error(i, f->quality, result.value, y, j);
  return accurate ? std::optional(result) : std::nullopt;
}

Result from_both_factors(const Primitives& primitives, Operand& a, Operand& b, int64_t i, int64_t j, Method method) {
  const Factor *f = a.factor(i, method), *g = b.factor(j, method);
  if (!f || !g) return {};
  if (f->rows.size(0) == 0 || g->rows.size(0) == 0) return {0, 0, f->method};
  const Tensor product = torch::stable::matmul(f->rows, torch::stable::transpose(g->rows, 0, 1));
  Result result = from_singular_values(primitives.to_host(aten::svdvals(product)));
  result.bound += a.factor_error(i, f->quality, result.value, b, j);
  result.bound += b.factor_error(j, g->quality, result.value, a, i);
  return result;
}

// F^T Y F of a factor that has more columns than Y has rank is singular: its eigenvalues are not accurate.
std::optional<Result> from_factor_of_lower_rank(const Primitives& primitives, Operand& a, Operand& b, int64_t i,
                                                int64_t j, Method method, double tolerance) {
  const std::optional<Result> found = from_one_factor(primitives, a, b, i, j, method, tolerance);
  if (found) return found;
  const Factor *f = a.factor(i, method), *g = b.factor(j, method);
  if (!g || g->rows.size(0) >= f->rows.size(0)) return std::nullopt;
  return from_one_factor(primitives, b, a, j, i, method, tolerance);
}

Result solve(const Primitives& primitives, Operand& a, Operand& b, int64_t i, int64_t j, Method method,
             double tolerance) {
  std::optional<Result> found;
  const bool cholesky = method == kAuto || method == kCholesky;
  if (const Tensor* lower = cholesky ? a.cholesky(i) : nullptr) {
    const Tensor product = primitives.triangular_sandwich(*lower, b.matrix(j));
    bool accurate = false;
    const std::vector<double> eigenvalues = primitives.to_host(aten::eigvalsh(product));
    const Result result = from_gram_eigenvalues(eigenvalues, tolerance, kCholesky, &accurate);
    if (accurate) return result;
    if (method == kCholesky) return b.semidefinite(j) ? result : Result{};
    found = from_cholesky_factors(primitives, a, b, i, j, result.value, tolerance);
    if (!found) found = from_one_factor(primitives, b, a, j, i, method, tolerance);  // it is B that may be singular
  } else if (method == kCholesky) {
    return {};
  } else if (method != kSvd) {
    found = from_factor_of_lower_rank(primitives, a, b, i, j, method, tolerance);
  }
  return found ? *found : from_both_factors(primitives, a, b, i, j, method);
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
    const Result result = solve(primitives, left, right, i, j, static_cast<Method>(method), tolerance);
    // Two factors: the product of the scales may leave the range where the value does not.
    const double scale_a = std::sqrt(left.scale(i)), scale_b = std::sqrt(right.scale(j));
    out[3 * n] = result.value * scale_a * scale_b;
    out[3 * n + 1] = result.bound * scale_a * scale_b;
    out[3 * n + 2] = result.method;
  }
  return rows;
}

}  // namespace fastgan
