// Operators on CPU tensors for the spectral norms of many weights, whose passes are those of spectral_norm.h. Vectors are
// contiguous, in float64 for float64 weights and else float32.
#include "spectral_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "recycled.h"
#include "workspace.h"

namespace fastgan {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kLeastColumns = 128;  // per task: fewer would use only a part of each cache line read

Tagged tagged(const Tensor& x) { return {x.data_ptr(), element_of(x)}; }

// A weight whose elements lie densely in memory, in any order of its dimensions, as the matrix that memory holds.
struct Placed {
  Tensor weight;  // or a dense copy
  Lines shape;
  bool is_transposed = false;     // the matrix in memory is the transpose of the weight's
  std::vector<int64_t> columns;   // which of the weight's columns each one in memory is; empty if it is the same one
  int64_t u_at = 0, v_at = 0;     // where its vectors begin in the flat ones
  int64_t rows = 0, n_columns = 0;  // of the weight's matrix

  Placed(const Tensor& given, int64_t dim) : weight(given) {
    std::vector<int64_t> order = memory_order(weight);
    if (order.empty() && weight.dim()) {
      weight = torch::stable::empty_like(given);
      torch::stable::copy_(weight, given);
      order = memory_order(weight);
    }
    rows = weight.size(dim);
    shape = {1, rows, 1};
    bool is_behind = false, in_order = true;
    int64_t last = -1;
    for (int64_t d : order) {
      if (d == dim) {
        is_behind = true;
        continue;
      }
      (is_behind ? shape.length : shape.blocks) *= weight.size(d);
      in_order = in_order && d > last;
      last = d;
    }
    n_columns = shape.columns();
    if (!in_order) number_columns(order, dim);
    if (shape.length == 1 && shape.blocks > 1 && rows > 1) {  // lines of one element each would be slow
      is_transposed = true;
      shape = {1, shape.blocks, rows};
    }
  }

 private:
  // Dimensions from the slowest to the fastest; none if elements overlap or leave gaps.
  static std::vector<int64_t> memory_order(const Tensor& x) {
    std::vector<int64_t> order(x.dim());
    std::iota(order.begin(), order.end(), int64_t(0));
    if (x.is_contiguous()) return order;
    const auto is_wide = [&](int64_t d) { return x.size(d) > 1; };  // others have any stride, and may stand anywhere
    const auto wide = std::stable_partition(order.begin(), order.end(), [&](int64_t d) { return !is_wide(d); });
    std::sort(wide, order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
    int64_t expected = 1;
    for (auto d = order.end(); d != wide;) {
      if (x.stride(*--d) != expected) return {};
      expected *= x.size(*d);
    }
    return order;
  }

  void number_columns(const std::vector<int64_t>& order, int64_t dim) {
    columns = {0};
    for (int64_t d : order) {
      if (d == dim || weight.size(d) == 1) continue;
      int64_t stride = 1;
      for (int64_t e = d + 1; e < weight.dim(); ++e)
        if (e != dim) stride *= weight.size(e);
      std::vector<int64_t> next;
      next.reserve(columns.size() * size_t(weight.size(d)));
      for (int64_t first : columns)
        for (int64_t i = 0; i < weight.size(d); ++i) next.push_back(first + i * stride);
      columns = std::move(next);
    }
  }
};

std::vector<Placed> placed(const Tensors& weights, const std::vector<int64_t>& dims) {
  std::vector<Placed> all;
  all.reserve(weights.size());
  int64_t u_at = 0, v_at = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    all.emplace_back(weights[i], dims[i]);
    Placed& last = all.back();
    last.u_at = std::exchange(u_at, u_at + last.rows);
    last.v_at = std::exchange(v_at, v_at + last.n_columns);
  }
  return all;
}

// `x`, or a copy of it, in the order of memory of `like`, a dense tensor of its shape.
Tensor laid_out(const Tensor& x, const Tensor& like) {
  bool is_alike = true;
  for (int64_t d = 0; d < x.dim(); ++d) is_alike = is_alike && (x.size(d) == 1 || x.stride(d) == like.stride(d));
  if (is_alike) return x;
  Tensor copy = Recycler::instance().empty_like(like, x.scalar_type());
  torch::stable::copy_(copy, x);
  return copy;
}

template <typename Kernel, typename Operand, typename... Rest>
void run(Kernel kernel, const Pass<Operand>& pass, Rest... rest) {
  torch::stable::parallel_for(0, int64_t(pass.parts.size()), 1, [&](int64_t begin, int64_t end) {
    kernel(pass.operands.data(), pass.parts.data(), begin, end, rest...);
  });
}

template <typename W>
double norm(const W* x, int64_t size) {
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) squares += double(x[i]) * double(x[i]);
  return std::sqrt(squares);
}

// old <- product / max(|product|, eps), if that length is above zero and finite.
template <typename W>
void normalize(const W* product, W* old, int64_t size, double eps) {
  const double length = norm(product, size);
  if (!(length > 0 && std::isfinite(W(length)))) return;
  const W divisor = W(std::max(length, eps));
  for (int64_t i = 0; i < size; ++i) old[i] = product[i] / divisor;
}

// A matrix in memory, and where its left and right vectors are.
template <typename W>
struct Matrix {
  Lines shape;
  Tagged w;
  W *u, *v;
  W* sigma;
};

// The power method on some matrices.
template <typename W>
class PowerMethod {
 public:
  PowerMethod(const std::vector<Matrix<W>>& matrices, double eps)
      : matrices_(matrices), kernels_(spectral_norm_kernels(sizeof(W) == sizeof(double))), eps_(eps) {
    for (const Matrix<W>& x : matrices) {
      u_at_.push_back(u_at_.back() + x.shape.rows);
      v_at_.push_back(v_at_.back() + x.shape.columns());
    }
    u_product_.resize(u_at_.back());
    v_product_.resize(v_at_.back());
  }

  void run(int64_t iterations, bool v_first) {
    if (iterations && !v_first) set_up_iterations();
    for (int64_t n = 0; n < iterations; ++n) {
      if (v_first) {
        multiply_by_u(all());
        for (size_t i = 0; i < matrices_.size(); ++i) normalize_v(i);
        multiply_by_v();
        for (size_t i = 0; i < matrices_.size(); ++i)
          normalize(&u_product_[u_at_[i]], matrices_[i].u, matrices_[i].shape.rows, eps_);
      } else {
        iterate();
      }
    }
    if (iterations == 0) v_first ? multiply_by_v() : multiply_by_u(all());
    for (size_t i = 0; i < matrices_.size(); ++i) {
      const Matrix<W>& x = matrices_[i];
      const W* product = v_first ? &u_product_[u_at_[i]] : &v_product_[v_at_[i]];
      const W* vector = v_first ? x.u : x.v;
      const int64_t size = v_first ? x.shape.rows : x.shape.columns();
      double sum = 0;
      for (int64_t k = 0; k < size; ++k) sum += double(product[k]) * double(vector[k]);
      *x.sigma = sum == 0 ? W(1) : W(sum);
    }
  }

 private:
  static constexpr int64_t kLeastRows = 32, kMostParts = 8;  // per iteration: each part has sums of all columns
  // W^T s is |s| times the product with u, unless it may have left the range of type W.
  static constexpr double kLeastNorm = 0x1p-20, kLargestNorm = 0x1p20;

  std::vector<size_t> all() const {
    std::vector<size_t> indices(matrices_.size());
    std::iota(indices.begin(), indices.end(), size_t(0));
    return indices;
  }

  void multiply_by_v() {
    Pass<Product> pass;
    for (size_t i = 0; i < matrices_.size(); ++i) {
      const Matrix<W>& x = matrices_[i];
      pass.operands.push_back({x.shape, x.w, x.v, &u_product_[u_at_[i]]});
      pass.cut(x.shape.rows, x.shape.columns());
    }
    fastgan::run(kernels_.rows, pass);
  }

  void multiply_by_u(const std::vector<size_t>& indices) {
    Pass<Product> pass;
    for (size_t i : indices) {
      const Matrix<W>& x = matrices_[i];
      pass.operands.push_back({x.shape, x.w, x.u, &v_product_[v_at_[i]]});
      pass.cut(x.shape.columns(), x.shape.rows, kLeastColumns);
    }
    fastgan::run(kernels_.columns, pass);
  }

  void normalize_v(size_t i) {
    normalize(&v_product_[v_at_[i]], matrices_[i].v, matrices_[i].shape.columns(), eps_);
  }

  void set_up_iterations() {
    int64_t size = 0;
    std::vector<int64_t> sums_at;
    for (size_t i = 0; i < matrices_.size(); ++i) {
      const Matrix<W>& x = matrices_[i];
      const int64_t parts =
          std::clamp(x.shape.rows * x.shape.columns() / (4 * kTaskElements), int64_t(1),
                     std::min(kMostParts, 1 + x.shape.rows / kLeastRows));
      const int64_t every = (x.shape.rows + parts - 1) / parts;
      iterations_.operands.push_back({x.shape, x.w, x.v, &u_product_[u_at_[i]], nullptr, every});
      iterations_.cut_evenly(x.shape.rows, every);
      sums_at.push_back(size);
      size += parts * x.shape.columns();
    }
    sums_.reset(new W[size]);
    for (size_t i = 0; i < matrices_.size(); ++i) iterations_.operands[i].sums = &sums_[sums_at[i]];
  }

  // u <- W v / |W v| and v <- W^T u / |W^T u|, all weights in one pass over memory.
  void iterate() {
    fastgan::run(kernels_.iterate, iterations_);
    std::vector<char> in_range(matrices_.size());
    torch::stable::parallel_for(0, int64_t(matrices_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) in_range[i] = take_products(i);
    });
    std::vector<size_t> others;
    for (size_t i = 0; i < matrices_.size(); ++i)
      if (!in_range[i]) others.push_back(i);
    if (!others.empty()) multiply_by_u(others);
    for (size_t i : others) normalize_v(i);
  }

  // Renews u, and v if W^T u is known then, which this returns.
  bool take_products(size_t i) {
    const Iteration& x = iterations_.operands[i];
    const int64_t rows = x.shape.rows, columns = x.shape.columns();
    const W *s = static_cast<const W*>(x.s), *sums = static_cast<const W*>(x.sums);
    const double length = norm(s, rows);
    normalize(s, matrices_[i].u, rows, eps_);
    if (!(length >= kLeastNorm && length <= kLargestNorm)) return false;
    W* product = &v_product_[v_at_[i]];
    std::copy_n(sums, columns, product);
    for (int64_t first = x.every; first < rows; first += x.every) {
      sums += columns;
      for (int64_t j = 0; j < columns; ++j) product[j] += sums[j];
    }
    const W divisor = W(std::max(length, eps_));
    for (int64_t j = 0; j < columns; ++j) product[j] /= divisor;
    if (!std::isfinite(norm(product, columns))) return false;
    normalize_v(i);
    return true;
  }

  const std::vector<Matrix<W>>& matrices_;
  const SpectralNormKernels& kernels_;
  const double eps_;
  std::vector<int64_t> u_at_{0}, v_at_{0};
  std::vector<W> u_product_, v_product_;
  Pass<Iteration> iterations_;
  std::unique_ptr<W[]> sums_;
};

template <typename W>
void update(const std::vector<Placed>& weights, const Tensors& us, const Tensors& vs, int64_t iterations, double eps,
            bool v_first, W* u, W* v, W* sigma) {
  std::vector<std::vector<W>> reordered(weights.size());
  std::vector<Matrix<W>> straight, transposed;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Placed& x = weights[i];
    W *left = u + x.u_at, *right = v + x.v_at;
    std::copy_n(static_cast<const W*>(us[i].data_ptr()), x.rows, left);
    const W* from = static_cast<const W*>(vs[i].data_ptr());
    if (x.columns.empty()) {
      std::copy_n(from, x.n_columns, right);
    } else {
      for (int64_t column : x.columns) reordered[i].push_back(from[column]);
      right = reordered[i].data();
    }
    if (x.is_transposed)
      transposed.push_back({x.shape, tagged(x.weight), right, left, sigma + i});
    else
      straight.push_back({x.shape, tagged(x.weight), left, right, sigma + i});
  }
  if (!straight.empty()) PowerMethod<W>(straight, eps).run(iterations, v_first);
  if (!transposed.empty()) PowerMethod<W>(transposed, eps).run(iterations, !v_first);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Placed& x = weights[i];
    for (int64_t k = 0; k < int64_t(x.columns.size()); ++k) v[x.v_at + x.columns[k]] = reordered[i][k];
    if (iterations == 0) continue;
    std::copy_n(u + x.u_at, x.rows, static_cast<W*>(us[i].data_ptr()));
    std::copy_n(v + x.v_at, x.n_columns, static_cast<W*>(vs[i].data_ptr()));
  }
}

void spectral_norm_update(Tensors weights, Tensors us, Tensors vs, std::vector<int64_t> dims, int64_t iterations,
                          double eps, bool v_first, Tensor u, Tensor v, Tensor sigma) {
  const std::vector<Placed> all = placed(weights, dims);
  const auto run = [&](auto zero) {
    using W = decltype(zero);
    update(all, us, vs, iterations, eps, v_first, static_cast<W*>(u.data_ptr()), static_cast<W*>(v.data_ptr()),
           static_cast<W*>(sigma.data_ptr()));
  };
  element_of(u) == Element::kDouble ? run(double()) : run(float());
}

// What gradients need of a network: its weights, vectors and sigmas. `left` and `right` are those of the matrices in
// memory.
class Normed {
 public:
  std::vector<Placed> weights;
  const bool is_double;

  Normed(const Tensors& given, const Tensor& u, const Tensor& v, const Tensor& sigma, const std::vector<int64_t>& dims)
      : weights(placed(given, dims)),
        is_double(element_of(u) == Element::kDouble),
        reordered_(given.size()),
        u_(static_cast<const char*>(u.data_ptr())),
        v_(static_cast<const char*>(v.data_ptr())),
        sigmas_(sigma.data_ptr()) {
    for (size_t i = 0; i < weights.size(); ++i) is_double ? reorder<double>(i) : reorder<float>(i);
  }

  const void* left(size_t i) const { return weights[i].is_transposed ? v_of(i) : u_of(i); }
  const void* right(size_t i) const { return weights[i].is_transposed ? u_of(i) : v_of(i); }

  double sigma(size_t i) const {
    return is_double ? static_cast<const double*>(sigmas_)[i] : double(static_cast<const float*>(sigmas_)[i]);
  }

 private:
  int64_t size() const { return is_double ? 8 : 4; }
  const void* u_of(size_t i) const { return u_ + weights[i].u_at * size(); }
  const void* v_of(size_t i) const {
    return reordered_[i].empty() ? v_ + weights[i].v_at * size() : static_cast<const void*>(reordered_[i].data());
  }

  template <typename W>
  void reorder(size_t i) {
    const std::vector<int64_t>& columns = weights[i].columns;
    const W* from = reinterpret_cast<const W*>(v_) + weights[i].v_at;
    reordered_[i].resize(columns.size() * sizeof(W));
    W* to = reinterpret_cast<W*>(reordered_[i].data());
    for (size_t k = 0; k < columns.size(); ++k) to[k] = from[columns[k]];
  }

  std::vector<std::vector<char>> reordered_;
  const char *u_, *v_;
  const void* sigmas_;
};

void combine(const Normed& normed, Pass<Combination>& pass) {
  run(spectral_norm_kernels(normed.is_double).combine, pass);
}

void add(Pass<Combination>& pass, const Combination& x) {
  pass.operands.push_back(x);
  pass.cut(x.shape.lines(), x.shape.length);
}

Tensors spectral_norm_scale(Tensors weights, Tensor u, Tensor v, Tensor sigma, std::vector<int64_t> dims,
                            torch::headeronly::ScalarType dtype) {
  const Normed normed(weights, u, v, sigma, dims);
  Tensors out;
  Pass<Combination> pass;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Placed& w = normed.weights[i];
    out.push_back(Recycler::instance().empty_like(w.weight, dtype));
    add(pass, {w.shape, tagged(w.weight), {}, tagged(out[i]), normed.sigma(i), 0, 0, nullptr, nullptr});
  }
  combine(normed, pass);
  return out;
}

// Gradients in the layouts of the weights.
Tensors laid_out_like(const Normed& normed, const Tensors& gradients) {
  Tensors all;
  for (size_t i = 0; i < gradients.size(); ++i) all.push_back(laid_out(gradients[i], normed.weights[i].weight));
  return all;
}

// <G, W>, <H, G> and <H, u v^T> of each weight; without `h` the first alone.
std::vector<std::array<double, 3>> dots(const Normed& normed, const Tensors& h, const Tensors& g) {
  Pass<Dots> pass;
  for (size_t i = 0; i < g.size(); ++i) {
    const Placed& w = normed.weights[i];
    pass.operands.push_back({w.shape, tagged(w.weight), tagged(g[i]), h.empty() ? Tagged{} : tagged(h[i]),
                             normed.left(i), normed.right(i)});
    pass.cut(w.shape.lines(), w.shape.length);
  }
  std::vector<double> sums(3 * pass.parts.size());
  run(spectral_norm_kernels(normed.is_double).dots, pass, sums.data());
  std::vector<std::array<double, 3>> totals(g.size());
  for (size_t part = 0; part < pass.parts.size(); ++part)
    for (int k = 0; k < 3; ++k) totals[pass.parts[part].operand][k] += sums[3 * part + k];
  return totals;
}

Tensors spectral_norm_scale_bwd(Tensors given, Tensors weights, Tensor u, Tensor v, Tensor sigma,
                                std::vector<int64_t> dims) {
  const Normed normed(weights, u, v, sigma, dims);
  const Tensors grads = laid_out_like(normed, given);
  const auto sums = dots(normed, {}, grads);
  Tensors out;
  Pass<Combination> pass;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Placed& w = normed.weights[i];
    const double s = normed.sigma(i);
    out.push_back(Recycler::instance().empty_like(w.weight, w.weight.scalar_type()));
    add(pass, {w.shape, tagged(grads[i]), {}, tagged(out[i]), s, 0, -sums[i][0] / s / s, normed.left(i),
               normed.right(i)});
  }
  combine(normed, pass);
  return out;
}

// Gradients of all `given`, then those of all weights.
Tensors spectral_norm_scale_bwd_bwd(Tensors grad_grads, Tensors given, Tensors weights, Tensor u, Tensor v,
                                    Tensor sigma, std::vector<int64_t> dims) {
  const Normed normed(weights, u, v, sigma, dims);
  const Tensors grads = laid_out_like(normed, given), h = laid_out_like(normed, grad_grads);
  const auto sums = dots(normed, h, grads);
  Tensors d_grads, d_weights;
  Pass<Combination> pass;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Placed& w = normed.weights[i];
    const double s = normed.sigma(i), gw = sums[i][0], hg = sums[i][1], huv = sums[i][2], p = -huv / s / s;
    d_grads.push_back(Recycler::instance().empty_like(w.weight, grads[i].scalar_type()));
    d_weights.push_back(Recycler::instance().empty_like(w.weight, w.weight.scalar_type()));
    add(pass, {w.shape, tagged(h[i]), tagged(w.weight), tagged(d_grads[i]), s, p, 0, nullptr, nullptr});
    add(pass, {w.shape, {}, tagged(grads[i]), tagged(d_weights[i]), s, p, (2 * (gw / s) * huv - hg) / s / s,
               normed.left(i), normed.right(i)});
  }
  combine(normed, pass);
  for (const Tensor& d_weight : d_weights) d_grads.push_back(d_weight);
  return d_grads;
}

int64_t release_memory() { return Recycler::instance().release(); }

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CPU, m) {
  m.impl("spectral_norm_update", TORCH_BOX(&fastgan::spectral_norm_update));
  m.impl("spectral_norm_scale", TORCH_BOX(&fastgan::spectral_norm_scale));
  m.impl("spectral_norm_scale_bwd", TORCH_BOX(&fastgan::spectral_norm_scale_bwd));
  m.impl("spectral_norm_scale_bwd_bwd", TORCH_BOX(&fastgan::spectral_norm_scale_bwd_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&fastgan::release_memory));
}
