// Operators on CPU tensors for the spectral norms of many weights, whose passes are those of spectral_norm.h. Weights
// are contiguous; vectors are contiguous, in float64 for float64 weights and else float32. Outputs are given.
#include "spectral_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "workspace.h"

namespace fastgan {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kLeastColumns = 128;  // of a task: less would use a part of each cache line that it reads

Tagged tagged(const Tensor& x) { return {x.data_ptr(), element_of(x)}; }

// Shapes of the weights, and where their vectors lie in the flat ones.
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

// old <- product / max(|product|, eps), if that length is above zero and finite.
template <typename W>
void normalize(const W* product, W* old, int64_t size, double eps) {
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) squares += double(product[i]) * double(product[i]);
  const double length = std::sqrt(squares);
  if (!(length > 0 && std::isfinite(W(length)))) return;
  const W divisor = W(std::max(length, eps));
  for (int64_t i = 0; i < size; ++i) old[i] = product[i] / divisor;
}

template <typename W>
void update_vectors(const Network& network, const Tensors& weights, int64_t iterations, double eps, bool v_first, W* u,
                    W* v, W* sigma) {
  const SpectralNormKernels& kernels = spectral_norm_kernels(sizeof(W) == sizeof(double));
  const size_t count = weights.size();
  std::vector<W> u_product(network.u_at.back()), v_product(network.v_at.back());
  Pass<Product> rows, columns;
  for (size_t i = 0; i < count; ++i) {
    const Lines& shape = network.shapes[i];
    rows.operands.push_back({shape, tagged(weights[i]), v + network.v_at[i], &u_product[network.u_at[i]]});
    rows.cut(shape.rows, shape.columns());
    columns.operands.push_back({shape, tagged(weights[i]), u + network.u_at[i], &v_product[network.v_at[i]]});
    columns.cut(shape.columns(), shape.rows, kLeastColumns);
  }
  const auto renew_u = [&] {
    run(kernels.rows, rows);
    for (size_t i = 0; i < count; ++i)
      normalize(&u_product[network.u_at[i]], u + network.u_at[i], network.shapes[i].rows, eps);
  };
  const auto renew_v = [&] {
    run(kernels.columns, columns);
    for (size_t i = 0; i < count; ++i)
      normalize(&v_product[network.v_at[i]], v + network.v_at[i], network.shapes[i].columns(), eps);
  };
  for (int64_t n = 0; n < iterations; ++n) {
    v_first ? renew_v() : renew_u();
    v_first ? renew_u() : renew_v();
  }
  if (iterations == 0) run(v_first ? kernels.rows : kernels.columns, v_first ? rows : columns);
  const std::vector<W>& product = v_first ? u_product : v_product;
  const std::vector<int64_t>& at = v_first ? network.u_at : network.v_at;
  const W* vector = v_first ? u : v;
  for (size_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t k = at[i]; k < at[i + 1]; ++k) sum += double(product[k]) * double(vector[k]);
    sigma[i] = sum == 0 ? W(1) : W(sum);
  }
}

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
    update_vectors(network, weights, iterations, eps, v_first, static_cast<W*>(u.data_ptr()),
                   static_cast<W*>(v.data_ptr()), static_cast<W*>(sigma.data_ptr()));
  };
  is_double ? update(double()) : update(float());
  if (iterations == 0) return;
  copy_vectors(us, u, network.u_at, size, true);
  copy_vectors(vs, v, network.v_at, size, true);
}

// What gradients need of a network: its vectors and sigmas.
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

// <G, W>, <H, G> and <H, u v^T> of each weight; without `h` the first alone.
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
