// Operators on CPU tensors for the spectral norms of many weights, by the passes of spectral_norm.h. Weights and
// vectors are contiguous; vectors are float64 for float64 weights, otherwise float32. Callers allocate the outputs.
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
#include <vector>

#include "workspace.h"

namespace fastgan {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kLeastColumns = 128;  // per task: fewer would use only a part of each cache line read

Tagged tagged(const Tensor& x) { return {x.data_ptr(), element_of(x)}; }

// Shapes of the weights, and the offsets of their vectors in the flat ones.
struct Network {
  std::vector<Lines> shapes;
  std::vector<int64_t> u_at{0}, v_at{0};

  Network(const Tensors& weights, const std::vector<int64_t>& dims) {
    for (size_t i = 0; i < weights.size(); ++i) {
      Lines lines{1, weights[i].size(dims[i]), 1};
      for (int64_t d = 0; d < weights[i].dim(); ++d)
        if (d != dims[i]) (d < dims[i] ? lines.blocks : lines.length) *= weights[i].size(d);
      shapes.push_back(lines);
      u_at.push_back(u_at.back() + lines.rows);
      v_at.push_back(v_at.back() + lines.columns());
    }
  }
};

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

// The power method on all weights.
template <typename W>
class PowerMethod {
 public:
  PowerMethod(const Network& network, const Tensors& weights, double eps, W* u, W* v)
      : network_(network),
        kernels_(spectral_norm_kernels(sizeof(W) == sizeof(double))),
        weights_(weights),
        eps_(eps),
        u_(u),
        v_(v),
        u_product_(network.u_at.back()),
        v_product_(network.v_at.back()) {}

  void run(int64_t iterations, bool v_first, W* sigma) {
    if (iterations && !v_first) set_up_iterations();
    for (int64_t n = 0; n < iterations; ++n) {
      if (v_first) {
        multiply_by_u(all());
        normalize_all(v_product_, v_, network_.v_at);
        multiply_by_v();
        normalize_all(u_product_, u_, network_.u_at);
      } else {
        iterate();
      }
    }
    if (iterations == 0) v_first ? multiply_by_v() : multiply_by_u(all());
    const std::vector<W>& product = v_first ? u_product_ : v_product_;
    const std::vector<int64_t>& at = v_first ? network_.u_at : network_.v_at;
    const W* vector = v_first ? u_ : v_;
    for (size_t i = 0; i < weights_.size(); ++i) {
      double sum = 0;
      for (int64_t k = at[i]; k < at[i + 1]; ++k) sum += double(product[k]) * double(vector[k]);
      sigma[i] = sum == 0 ? W(1) : W(sum);
    }
  }

 private:
  static constexpr int64_t kLeastRows = 32, kMostParts = 8;  // per iteration: each part has sums of all columns
  // W^T s is |s| times the product with u, unless it may have left the range of type W.
  static constexpr double kLeastNorm = 0x1p-20, kLargestNorm = 0x1p20;

  std::vector<size_t> all() const {
    std::vector<size_t> indices(weights_.size());
    std::iota(indices.begin(), indices.end(), size_t(0));
    return indices;
  }

  void multiply_by_v() {
    Pass<Product> pass;
    for (size_t i = 0; i < weights_.size(); ++i) {
      const Lines& shape = network_.shapes[i];
      pass.operands.push_back({shape, tagged(weights_[i]), v_ + network_.v_at[i], &u_product_[network_.u_at[i]]});
      pass.cut(shape.rows, shape.columns());
    }
    fastgan::run(kernels_.rows, pass);
  }

  void multiply_by_u(const std::vector<size_t>& indices) {
    Pass<Product> pass;
    for (size_t i : indices) {
      const Lines& shape = network_.shapes[i];
      pass.operands.push_back({shape, tagged(weights_[i]), u_ + network_.u_at[i], &v_product_[network_.v_at[i]]});
      pass.cut(shape.columns(), shape.rows, kLeastColumns);
    }
    fastgan::run(kernels_.columns, pass);
  }

  void normalize_all(const std::vector<W>& products, W* vectors, const std::vector<int64_t>& at) {
    for (size_t i = 0; i < weights_.size(); ++i) normalize(&products[at[i]], vectors + at[i], at[i + 1] - at[i], eps_);
  }

  void set_up_iterations() {
    int64_t size = 0;
    std::vector<int64_t> sums_at;
    for (size_t i = 0; i < weights_.size(); ++i) {
      const Lines& shape = network_.shapes[i];
      const int64_t parts =
          std::clamp(shape.rows * shape.columns() / (4 * kTaskElements), int64_t(1),
                     std::min(kMostParts, 1 + shape.rows / kLeastRows));
      const int64_t every = (shape.rows + parts - 1) / parts;
      iterations_.operands.push_back(
          {shape, tagged(weights_[i]), v_ + network_.v_at[i], &u_product_[network_.u_at[i]], nullptr, every});
      iterations_.cut_evenly(shape.rows, every);
      sums_at.push_back(size);
      size += parts * shape.columns();
    }
    sums_.reset(new W[size]);
    for (size_t i = 0; i < weights_.size(); ++i) iterations_.operands[i].sums = &sums_[sums_at[i]];
  }

  // u <- W v / |W v| and v <- W^T u / |W^T u|, all weights in one pass over memory.
  void iterate() {
    fastgan::run(kernels_.iterate, iterations_);
    std::vector<char> in_range(weights_.size());
    torch::stable::parallel_for(0, int64_t(weights_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) in_range[i] = take_products(i);
    });
    std::vector<size_t> others;
    for (size_t i = 0; i < weights_.size(); ++i)
      if (!in_range[i]) others.push_back(i);
    if (!others.empty()) multiply_by_u(others);
    normalize_all(v_product_, v_, network_.v_at);
  }

  // Updates u; returns whether this also computed W^T u.
  bool take_products(size_t i) {
    const Iteration& x = iterations_.operands[i];
    const int64_t rows = x.shape.rows, columns = x.shape.columns();
    const W *s = static_cast<const W*>(x.s), *sums = static_cast<const W*>(x.sums);
    const double length = norm(s, rows);
    normalize(s, u_ + network_.u_at[i], rows, eps_);
    if (!(length >= kLeastNorm && length <= kLargestNorm)) return false;
    W* product = &v_product_[network_.v_at[i]];
    std::copy_n(sums, columns, product);
    for (int64_t first = x.every; first < rows; first += x.every) {
      sums += columns;
      for (int64_t j = 0; j < columns; ++j) product[j] += sums[j];
    }
    const W divisor = W(std::max(length, eps_));
    for (int64_t j = 0; j < columns; ++j) product[j] /= divisor;
    return std::isfinite(norm(product, columns));
  }

  const Network& network_;
  const SpectralNormKernels& kernels_;
  const Tensors& weights_;
  const double eps_;
  W *const u_, *const v_;
  std::vector<W> u_product_, v_product_;
  Pass<Iteration> iterations_;
  std::unique_ptr<W[]> sums_;
};

void copy_vectors(const Tensors& parts, const Tensor& flat, const std::vector<int64_t>& at, int64_t size, bool back) {
  auto* whole = static_cast<char*>(flat.data_ptr());
  for (size_t i = 0; i < parts.size(); ++i) {
    void *part = parts[i].data_ptr(), *place = whole + at[i] * size;
    std::memcpy(back ? part : place, back ? place : part, size_t((at[i + 1] - at[i]) * size));
  }
}

void spectral_norm_update(Tensors weights, Tensors us, Tensors vs, std::vector<int64_t> dims, int64_t iterations,
                          double eps, bool v_first, Tensor u, Tensor v, Tensor sigma) {
  const Network network(weights, dims);
  const bool is_double = element_of(u) == Element::kDouble;
  const int64_t size = is_double ? 8 : 4;
  copy_vectors(us, u, network.u_at, size, false);
  copy_vectors(vs, v, network.v_at, size, false);
  const auto update = [&](auto zero) {
    using W = decltype(zero);
    PowerMethod<W> method(network, weights, eps, static_cast<W*>(u.data_ptr()), static_cast<W*>(v.data_ptr()));
    method.run(iterations, v_first, static_cast<W*>(sigma.data_ptr()));
  };
  is_double ? update(double()) : update(float());
  if (iterations == 0) return;
  copy_vectors(us, u, network.u_at, size, true);
  copy_vectors(vs, v, network.v_at, size, true);
}

// The vectors and sigmas of a network, which gradients need.
struct Normed {
  Network network;
  bool is_double;
  const char *u, *v;
  const void* sigmas;

  Normed(const Tensors& weights, const Tensor& u, const Tensor& v, const Tensor& sigma, const std::vector<int64_t>& dims)
      : network(weights, dims),
        is_double(element_of(u) == Element::kDouble),
        u(static_cast<const char*>(u.data_ptr())),
        v(static_cast<const char*>(v.data_ptr())),
        sigmas(sigma.data_ptr()) {}

  int64_t size() const { return is_double ? 8 : 4; }
  const void* u_of(size_t i) const { return u + network.u_at[i] * size(); }
  const void* v_of(size_t i) const { return v + network.v_at[i] * size(); }
  double sigma(size_t i) const {
    return is_double ? static_cast<const double*>(sigmas)[i] : double(static_cast<const float*>(sigmas)[i]);
  }
};

void combine(const Normed& normed, Pass<Combination>& pass) {
  run(spectral_norm_kernels(normed.is_double).combine, pass);
}

void add(Pass<Combination>& pass, const Combination& x) {
  pass.operands.push_back(x);
  pass.cut(x.shape.lines(), x.shape.length);
}

void spectral_norm_scale(Tensors weights, Tensor u, Tensor v, Tensor sigma, std::vector<int64_t> dims, Tensors out) {
  const Normed normed(weights, u, v, sigma, dims);
  Pass<Combination> pass;
  for (size_t i = 0; i < weights.size(); ++i)
    add(pass, {normed.network.shapes[i], tagged(weights[i]), {}, tagged(out[i]), normed.sigma(i), 0, 0, nullptr, nullptr});
  combine(normed, pass);
}

// <G, W>, <H, G> and <H, u v^T> per weight; only the first if there is no `h`.
std::vector<std::array<double, 3>> dots(const Normed& normed, const Tensors& h, const Tensors& g, const Tensors& w) {
  Pass<Dots> pass;
  for (size_t i = 0; i < w.size(); ++i) {
    pass.operands.push_back({normed.network.shapes[i], tagged(w[i]), tagged(g[i]), h.empty() ? Tagged{} : tagged(h[i]),
                             normed.u_of(i), normed.v_of(i)});
    pass.cut(normed.network.shapes[i].lines(), normed.network.shapes[i].length);
  }
  std::vector<double> sums(3 * pass.parts.size());
  run(spectral_norm_kernels(normed.is_double).dots, pass, sums.data());
  std::vector<std::array<double, 3>> totals(w.size());
  for (size_t part = 0; part < pass.parts.size(); ++part)
    for (int k = 0; k < 3; ++k) totals[pass.parts[part].operand][k] += sums[3 * part + k];
  return totals;
}

void spectral_norm_scale_bwd(Tensors grads, Tensors weights, Tensor u, Tensor v, Tensor sigma,
                             std::vector<int64_t> dims, Tensors out) {
  const Normed normed(weights, u, v, sigma, dims);
  const auto sums = dots(normed, {}, grads, weights);
  Pass<Combination> pass;
  for (size_t i = 0; i < weights.size(); ++i) {
    const double s = normed.sigma(i);
    add(pass, {normed.network.shapes[i], tagged(grads[i]), {}, tagged(out[i]), s, 0, -sums[i][0] / s / s, normed.u_of(i),
               normed.v_of(i)});
  }
  combine(normed, pass);
}

void spectral_norm_scale_bwd_bwd(Tensors grad_grads, Tensors grads, Tensors weights, Tensor u, Tensor v, Tensor sigma,
                                 std::vector<int64_t> dims, Tensors d_grads, Tensors d_weights) {
  const Normed normed(weights, u, v, sigma, dims);
  const auto sums = dots(normed, grad_grads, grads, weights);
  Pass<Combination> pass;
  for (size_t i = 0; i < weights.size(); ++i) {
    const double s = normed.sigma(i), gw = sums[i][0], hg = sums[i][1], huv = sums[i][2], p = -huv / s / s;
    const Lines& shape = normed.network.shapes[i];
    add(pass, {shape, tagged(grad_grads[i]), tagged(weights[i]), tagged(d_grads[i]), s, p, 0, nullptr, nullptr});
    add(pass, {shape, {}, tagged(grads[i]), tagged(d_weights[i]), s, p, (2 * (gw / s) * huv - hg) / s / s,
               normed.u_of(i), normed.v_of(i)});
  }
  combine(normed, pass);
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CPU, m) {
  m.impl("spectral_norm_update", TORCH_BOX(&fastgan::spectral_norm_update));
  m.impl("spectral_norm_scale", TORCH_BOX(&fastgan::spectral_norm_scale));
  m.impl("spectral_norm_scale_bwd", TORCH_BOX(&fastgan::spectral_norm_scale_bwd));
  m.impl("spectral_norm_scale_bwd_bwd", TORCH_BOX(&fastgan::spectral_norm_scale_bwd_bwd));
}
