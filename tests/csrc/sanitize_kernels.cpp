// The passes of attention, its projections, spectral norms and definite traces on plain buffers of just the size that
// they ask for, with no torch: for AddressSanitizer and UBSan (`make sanitize`). Checked against the textbook formula,
// and the double backward against differences of it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "projections.h"
#include "definite_trace.h"
#include "spectral_norm.h"

namespace {

using namespace fastgan;
using Values = std::vector<double>;

std::mt19937 generator(0);

Values random_values(int64_t size) {
  std::normal_distribution<double> normal;
  Values x(size);
  for (double& value : x) value = normal(generator);
  return x;
}

struct Operands {
  Values q, k, v, go, sinks;  // sinks may be empty
};

struct Gradients {
  Values o, dq, dk, dv, d_sinks;
};

// One batch by the definition; `added` (heads, n, m) is added to the scaled logits.
Gradients textbook(const AttentionShape& s, const Operands& x, const Values& added) {
  Gradients g{Values(s.heads * s.n * s.e), Values(s.heads * s.n * s.d), Values(s.key_heads * s.m * s.d),
              Values(s.key_heads * s.m * s.e), Values(x.sinks.size())};
  for (int64_t row = 0; row < s.heads * s.n; ++row) {
    const int64_t head = row / s.n, first = head / s.sharing() * s.m;
    Values p(s.m), dp(s.m);
    const double sink = x.sinks.empty() ? 0 : std::exp(x.sinks[head]);
    double total = sink, delta = 0;
    for (int64_t m = 0; m < s.m; ++m) {
      for (int64_t i = 0; i < s.d; ++i) p[m] += s.scale * x.q[row * s.d + i] * x.k[(first + m) * s.d + i];
      total += p[m] = s.is_causal && m > row % s.n ? 0 : std::exp(p[m] + added[row * s.m + m]);
    }
    for (int64_t m = 0; m < s.m; ++m) {
      p[m] /= total > 0 ? total : 1;
      for (int64_t j = 0; j < s.e; ++j) {
        g.o[row * s.e + j] += p[m] * x.v[(first + m) * s.e + j];
        dp[m] += x.go[row * s.e + j] * x.v[(first + m) * s.e + j];
        g.dv[(first + m) * s.e + j] += p[m] * x.go[row * s.e + j];
      }
      delta += p[m] * dp[m];
    }
    if (!x.sinks.empty()) g.d_sinks[head] -= sink / total * delta;
    for (int64_t m = 0; m < s.m; ++m)
      for (int64_t i = 0; i < s.d; ++i) {
        const double ds = s.scale * p[m] * (dp[m] - delta);
        g.dq[row * s.d + i] += ds * x.k[(first + m) * s.d + i];
        g.dk[(first + m) * s.d + i] += ds * x.q[row * s.d + i];
      }
  }
  return g;
}

template <typename T, typename From>
std::vector<T> as(const std::vector<From>& x) {
  return {x.begin(), x.end()};
}

template <typename T>
View view(std::vector<T>& x, int64_t rows, int64_t channels) {
  return {x.data(), rows * channels, 0, channels, 1};
}

class Memory {
 public:
  explicit Memory(int64_t element) : element_(element) {}

  void* room(int64_t elements) {
    held_.push_back(std::make_unique<char[]>(elements * element_));
    return held_.back().get();
  }

  template <typename Pass>
  void give(Pass& x) {
    for (const Size& size : x.sizes()) *size.operand = {room(size.slices * size.elements), size.elements};
  }

 private:
  int64_t element_;
  std::vector<std::unique_ptr<char[]>> held_;
};

int failures = 0;

template <typename T>
void expect(const char* what, const std::vector<T>& found, const Values& truth) {
  double difference = 0, length = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    difference += std::pow(found[i] - truth[i], 2);
    length += std::pow(truth[i], 2);
  }
  const double error = std::sqrt(difference / std::max(length, 1e-30));
  const bool good = found.size() == truth.size() && error < (sizeof(T) == 4 ? 1e-5 : 1e-12);
  if (!good) ++failures;
  std::printf("%-4s %-40s relative error %.1e\n", good ? "ok" : "FAIL", what, error);
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

enum class Mask { kNone, kBoolean, kAdded };

// (1, heads, rows, channels).
template <typename T>
View heads_of(std::vector<T>& x, int64_t heads, int64_t rows, int64_t channels) {
  return {x.data(), heads * rows * channels, rows * channels, channels, 1};
}

template <typename T>
void test(const AttentionShape& s, Mask kind, bool has_sinks) {
  const int64_t rows = s.heads * s.n, keys = s.key_heads * s.m;
  const auto random_operands = [&] {
    return Operands{random_values(rows * s.d), random_values(keys * s.d), random_values(keys * s.e),
                    random_values(rows * s.e), random_values(has_sinks ? s.heads : 0)};
  };
  const Operands wide = random_operands();
  auto q = as<T>(wide.q), k = as<T>(wide.k), v = as<T>(wide.v), go = as<T>(wide.go), sinks = as<T>(wide.sinks);
  std::vector<T> o(rows * s.e), stats(2 * rows), dq(rows * s.d), dk(keys * s.d), dv(keys * s.e), d_sinks(sinks.size());
  const AttentionKernels& kernels = attention_kernels(sizeof(T) == 4 ? Element::kFloat : Element::kDouble);
  Memory memory(sizeof(T));

  Values added(rows * s.m);
  std::vector<uint8_t> seen(added.size());
  if (kind == Mask::kAdded) added = random_values(added.size());
  for (size_t i = 0; i < seen.size(); ++i) {
    seen[i] = int64_t(i) / s.m % 7 != 3 && generator() % 4 != 0;  // some rows see no key
    if (kind == Mask::kBoolean && !seen[i]) added[i] = -INFINITY;
  }
  Masking masking{};
  if (kind == Mask::kAdded) masking.mask = heads_of(added, s.heads, s.n, s.m), masking.element = Element::kDouble;
  if (kind == Mask::kBoolean) masking.mask = heads_of(seen, s.heads, s.n, s.m), masking.is_boolean = true;
  if (has_sinks) masking.sinks = sinks.data();

  AttentionForward forward{};
  forward.shape = s, forward.masking = masking;
  forward.q = heads_of(q, s.heads, s.n, s.d), forward.k = heads_of(k, s.key_heads, s.m, s.d);
  forward.v = heads_of(v, s.key_heads, s.m, s.e);
  forward.o = heads_of(o, s.heads, s.n, s.e), forward.stats = stats.data();
  memory.give(forward);
  kernels.forward_pack(forward, 0, s.key_slices() * s.tiles());
  kernels.forward(forward, 0, s.slices() * s.strips(), memory.room(forward_room(s)));

  AttentionBackward backward{};
  backward.shape = s, backward.masking = masking;
  backward.q = forward.q, backward.k = forward.k, backward.v = forward.v, backward.o = forward.o;
  backward.grad_o = heads_of(go, s.heads, s.n, s.e), backward.stats = stats.data();
  backward.dq = heads_of(dq, s.heads, s.n, s.d), backward.dk = heads_of(dk, s.key_heads, s.m, s.d);
  backward.dv = heads_of(dv, s.key_heads, s.m, s.e), backward.d_sinks = d_sinks.data();
  memory.give(backward);
  kernels.backward_pack_keys(backward, 0, s.key_slices() * s.tiles());
  kernels.backward_pack_rows(backward, 0, s.slices() * s.strips());
  kernels.backward(backward, 0, s.key_slices() * s.groups(), memory.room(backward_room(s)));
  kernels.backward_sum(backward, 0, s.slices() * s.strips());
  if (has_sinks) kernels.backward_sinks(backward, 0, s.heads);

  const Gradients truth = textbook(s, wide, added);
  expect("attention", o, truth.o);
  expect("attention, gradient of q", dq, truth.dq);
  expect("attention, gradient of k", dk, truth.dk);
  expect("attention, gradient of v", dv, truth.dv);
  if (has_sinks) expect("attention, gradient of sinks", d_sinks, truth.d_sinks);

  Operands given = random_operands();
  if (s.is_causal) std::fill(given.k.begin(), given.k.end(), 0), std::fill(given.v.begin(), given.v.end(), 0);
  auto ggq = as<T>(given.q), ggk = as<T>(given.k), ggv = as<T>(given.v), gg_sinks = as<T>(given.sinks);
  std::vector<T> g_do(rows * s.e), gq(rows * s.d), gk(keys * s.d), gv(keys * s.e), g_sinks(sinks.size());
  AttentionBackward2 second{};
  second.shape = s, second.masking = masking;
  second.q = forward.q, second.k = forward.k, second.v = forward.v, second.grad_o = backward.grad_o;
  second.stats = stats.data(), second.gg_sinks = gg_sinks.data();
  second.ggq = heads_of(ggq, s.heads, s.n, s.d), second.ggk = heads_of(ggk, s.key_heads, s.m, s.d);
  second.ggv = heads_of(ggv, s.key_heads, s.m, s.e);
  second.g_do = heads_of(g_do, s.heads, s.n, s.e), second.gq = heads_of(gq, s.heads, s.n, s.d);
  second.gk = heads_of(gk, s.key_heads, s.m, s.d), second.gv = heads_of(gv, s.key_heads, s.m, s.e);
  second.g_sinks = g_sinks.data();
  if (s.is_causal) second.ggk = second.ggv = {};  // null is zero
  memory.give(second);
  kernels.backward2_pack_keys(second, 0, s.key_slices() * s.tiles());
  kernels.backward2_rows(second, 0, s.slices() * s.strips(), memory.room(backward2_rows_room(s)));
  kernels.backward2_keys(second, 0, s.key_slices() * s.tiles(), memory.room(backward2_keys_room(s)));
  if (has_sinks) kernels.backward2_sinks(second, 0, s.heads);

  // Along a direction, and by a central difference of the textbook's gradients.
  const Operands way = random_operands();
  const auto slope = dot(way.q, as<double>(gq)) + dot(way.k, as<double>(gk)) + dot(way.v, as<double>(gv)) +
                     dot(way.go, as<double>(g_do)) + dot(way.sinks, as<double>(g_sinks));
  const double step = 1e-5;
  double differences = 0;
  for (const double sign : {-1.0, 1.0}) {
    Operands moved = wide;
    const auto move = [&](Values& x, const Values& by) {
      for (size_t i = 0; i < x.size(); ++i) x[i] += sign * step * by[i];
    };
    move(moved.q, way.q), move(moved.k, way.k), move(moved.v, way.v), move(moved.go, way.go);
    move(moved.sinks, way.sinks);
    const Gradients g = textbook(s, moved, added);
    differences += sign / (2 * step) * (dot(given.q, g.dq) + dot(given.k, g.dk) + dot(given.v, g.dv) +
                                        dot(given.sinks, g.d_sinks));
  }
  const double error = std::abs(slope - differences) / std::max(1.0, std::abs(differences));
  const bool good = error < (sizeof(T) == 4 ? 1e-3 : 1e-6);
  if (!good) ++failures;
  std::printf("%-4s %-40s relative error %.1e\n", good ? "ok" : "FAIL", "attention, second gradients", error);
}

// x (1, c, h, w), channels first or last.
Image image(std::vector<double>& x, int64_t channels, int64_t height, int64_t width, bool last) {
  const int64_t pixels = height * width;
  return {x.data(), Element::kDouble, pixels * channels, last ? 1 : pixels, width * (last ? channels : 1),
          last ? channels : 1};
}

void test_projections(int64_t channels, int64_t height, int64_t width, int64_t outputs, int64_t d, bool last) {
  const int64_t pixels = height * width, pooled = height / 2 * (width / 2), e = outputs - d;
  Values x = random_values(channels * pixels), weight = random_values(outputs * channels), bias = random_values(outputs);
  Values q(pixels * d), kv(pooled * e);
  std::vector<int8_t> index(pooled * e);
  const ProjectionKernels& kernels = projection_kernels(Element::kDouble);
  Memory memory(sizeof(double));

  PooledProjection p{};
  p.batches = 1, p.channels = channels, p.height = height, p.width = width, p.outputs = outputs, p.d = d;
  p.x = image(x, channels, height, width, last);
  p.weight = view(weight, outputs, channels), p.bias = view(bias, outputs, 1);
  p.q = view(q, pixels, d), p.kv = view(kv, pooled, e), p.index = index.data();
  memory.give(p);
  kernels.pooled_pack(p, 0, channels);
  kernels.pooled(p, 0, p.tiles(), memory.room(p.room()));

  Values all(pixels * outputs, 0), true_q, true_kv;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t o = 0; o < outputs; ++o) {
      all[i * outputs + o] = bias[o];
      for (int64_t c = 0; c < channels; ++c)
        all[i * outputs + o] += weight[o * channels + c] * x[last ? i * channels + c : c * pixels + i];
      if (o < d) true_q.push_back(all[i * outputs + o]);
    }
  for (int64_t i = 0; i < height / 2; ++i)
    for (int64_t j = 0; j < width / 2; ++j)
      for (int64_t o = d; o < outputs; ++o) {
        const double* corner = &all[(2 * i * width + 2 * j) * outputs + o];
        true_kv.push_back(std::max(std::max(corner[0], corner[outputs]),
                                   std::max(corner[width * outputs], corner[(width + 1) * outputs])));
      }
  expect("projection", q, true_q);
  expect("projection, pooled", kv, true_kv);

  Values y(channels * pixels), back = random_values(channels * d), shift = random_values(channels);
  ProjectionResidual r{};
  r.batches = 1, r.pixels = pixels, r.channels = channels, r.e = d;
  r.rows = p.q, r.weight = view(back, channels, d), r.bias = view(shift, channels, 1);
  r.x = p.x, r.y = image(y, channels, height, width, last);
  memory.give(r);
  kernels.residual_pack(r, 0, channels);
  kernels.residual(r, 0, r.tiles(), memory.room(r.room()));
  Values true_y = x;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      double& sum = true_y[last ? i * channels + c : c * pixels + i];
      sum += shift[c];
      for (int64_t j = 0; j < d; ++j) sum += back[c * d + j] * q[i * d + j];
    }
  expect("projection with residual", y, true_y);
}

// Rows (batches, pixels, channels), or pixels following one another.
View pixel_rows(Values& x, int64_t pixels, int64_t channels, bool transposed) {
  return {x.data(), pixels * channels, 0, transposed ? 1 : channels, transposed ? pixels : 1};
}

void test_projection_gradients(int64_t batches, int64_t pixels, int64_t outputs, int64_t channels, bool dy_transposed,
                               bool x_transposed) {
  Values dy = random_values(batches * pixels * outputs), x = random_values(batches * pixels * channels);
  Values weight = random_values(outputs * channels), dx(x.size()), dweight(weight.size());
  Values true_dx(x.size()), true_dweight(weight.size());
  for (int64_t i = 0; i < batches * pixels; ++i)
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t c = 0; c < channels; ++c) {
        const auto at = [&](int64_t j, int64_t width, bool transposed) {
          return i / pixels * pixels * width + (transposed ? j * pixels + i % pixels : i % pixels * width + j);
        };
        const double y = dy[at(o, outputs, dy_transposed)];
        true_dx[at(c, channels, x_transposed)] += y * weight[o * channels + c];
        true_dweight[o * channels + c] += y * x[at(c, channels, x_transposed)];
      }
  const ProjectionKernels& kernels = projection_kernels(Element::kDouble);
  Memory memory(sizeof(double));
  ProjectionGradients p{};
  p.batches = batches, p.pixels = pixels, p.outputs = outputs, p.channels = channels;
  p.dy = pixel_rows(dy, pixels, outputs, dy_transposed);
  p.x = pixel_rows(x, pixels, channels, x_transposed), p.dx = pixel_rows(dx, pixels, channels, x_transposed);
  p.weight = view(weight, outputs, channels), p.dweight = view(dweight, outputs, channels);
  memory.give(p);
  kernels.gradients_pack(p, 0, outputs);
  kernels.gradients(p, 0, p.chunks(), memory.room(p.room()));
  kernels.gradients_sum(p, 0, p.sum_rows());
  expect("projection, gradient of x", dx, true_dx);
  expect("projection, gradient of the weight", dweight, true_dweight);
}

void test_spectral_norm(const Lines& shape) {
  const int64_t size = shape.lines() * shape.length;
  Values w = random_values(size), g = random_values(size), h = random_values(size);
  Values u = random_values(shape.rows), v = random_values(shape.columns());
  Values wv(shape.rows), wu(shape.columns()), out(size), true_wv(shape.rows), true_wu(shape.columns()), true_out(size);
  double gw = 0, hg = 0, huv = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t line = i / shape.length, r = line % shape.rows;
    const int64_t c = line / shape.rows * shape.length + i % shape.length;
    true_wv[r] += w[i] * v[c];
    true_wu[c] += w[i] * u[r];
    gw += g[i] * w[i], hg += h[i] * g[i], huv += h[i] * u[r] * v[c];
    true_out[i] = g[i] / 1.5 + 0.3 * h[i] + 0.7 * u[r] * v[c];
  }
  const SpectralNormKernels& kernels = spectral_norm_kernels(true);
  const auto tagged = [](Values& x) { return Tagged{x.data(), Element::kDouble}; };

  Pass<Product> rows, columns;
  rows.operands.push_back({shape, tagged(w), v.data(), wv.data()});
  rows.cut(shape.rows, shape.columns());
  kernels.rows(rows.operands.data(), rows.parts.data(), 0, int64_t(rows.parts.size()));
  columns.operands.push_back({shape, tagged(w), u.data(), wu.data()});
  columns.cut(shape.columns(), shape.rows, 3);
  kernels.columns(columns.operands.data(), columns.parts.data(), 0, int64_t(columns.parts.size()));
  expect("spectral norm, W v", wv, true_wv);
  expect("spectral norm, W^T u", wu, true_wu);

  // Two parts, whose sums of columns are added.
  Pass<Iteration> iteration;
  const int64_t every = (shape.rows + 1) / 2, parts = (shape.rows + every - 1) / every;
  Values s(shape.rows), part_sums(parts * shape.columns()), wws(shape.columns()), true_wws(shape.columns());
  iteration.operands.push_back({shape, tagged(w), v.data(), s.data(), part_sums.data(), every});
  iteration.cut_evenly(shape.rows, every);
  kernels.iterate(iteration.operands.data(), iteration.parts.data(), 0, int64_t(iteration.parts.size()));
  for (size_t i = 0; i < part_sums.size(); ++i) wws[i % shape.columns()] += part_sums[i];
  for (int64_t i = 0; i < size; ++i) {
    const int64_t line = i / shape.length;
    true_wws[line / shape.rows * shape.length + i % shape.length] += w[i] * true_wv[line % shape.rows];
  }
  expect("spectral norm, W v of an iteration", s, true_wv);
  expect("spectral norm, W^T W v", wws, true_wws);

  Pass<Dots> dots;
  dots.operands.push_back({shape, tagged(w), tagged(g), tagged(h), u.data(), v.data()});
  dots.cut(shape.lines(), shape.length);
  Values sums(3 * dots.parts.size()), totals(3);
  kernels.dots(dots.operands.data(), dots.parts.data(), 0, int64_t(dots.parts.size()), sums.data());
  for (size_t i = 0; i < sums.size(); ++i) totals[i % 3] += sums[i];
  expect("spectral norm, inner products", totals, {gw, hg, huv});

  Pass<Combination> sum;
  sum.operands.push_back({shape, tagged(g), tagged(h), tagged(out), 1.5, 0.3, 0.7, u.data(), v.data()});
  sum.cut(shape.lines(), shape.length);
  kernels.combine(sum.operands.data(), sum.parts.data(), 0, int64_t(sum.parts.size()));
  expect("spectral norm, gradient", out, true_out);
}

// Of A = X X^T + I with itself the value is A's trace.
void test_definite_trace(int64_t d) {
  const Values x = random_values(d * d);
  Values a(d * d), lower(definite_elements(d)), room(definite_room(d));
  double trace = 0;
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) {
      a[i * d + j] = i == j;
      for (int64_t k = 0; k < d; ++k) a[i * d + j] += x[i * d + k] * x[j * d + k];
      if (i == j) trace += a[i * d + i];
    }
  const DefiniteTraceKernels& kernels = definite_trace_kernels(true);
  const double scale = kernels.factor(a.data(), d, lower.data());
  double value = 0, bound = 0;
  const bool found = kernels.trace(lower.data(), scale, a.data(), d, 1e-6, room.data(), &value, &bound);
  expect("trace of definite matrices", Values{found ? value : 0}, {trace});
}

}  // namespace

int main() {
  std::printf("vectors of %d bits\n", int(fastgan::vector_bits()));
  for (const AttentionShape& s :
       {AttentionShape{1, 1, 1, 5, 4, 3, 6, 0.7, false}, AttentionShape{1, 1, 1, 1, 1, 1, 1, 1.0, false},
        AttentionShape{1, 4, 2, 33, 65, 5, 17, 0.3, false}, AttentionShape{1, 2, 2, 40, 130, 8, 32, 0.4, true},
        AttentionShape{1, 3, 1, 150, 70, 2, 3, 0.5, true}, AttentionShape{1, 1, 1, 70, 2000, 2, 3, 0.5, false}})
    for (const Mask kind : {Mask::kNone, Mask::kBoolean, Mask::kAdded})
      for (const bool has_sinks : {false, true}) {
        test<float>(s, kind, has_sinks);
        test<double>(s, kind, has_sinks);
      }
  for (const bool last : {false, true}) {
    test_projections(3, 4, 6, 7, 3, last);
    test_projections(1, 5, 3, 2, 1, last);
    test_projections(20, 7, 37, 37, 5, last);
  }
  for (const bool dy_transposed : {false, true})
    for (const bool x_transposed : {false, true}) {
      test_projection_gradients(1, 3, 2, 3, dy_transposed, x_transposed);
      test_projection_gradients(3, 70, 19, 37, dy_transposed, x_transposed);
      test_projection_gradients(19, 65, 5, 2, dy_transposed, x_transposed);
    }
  for (const Lines& shape : {Lines{1, 1, 1}, Lines{1, 70, 300}, Lines{9, 5, 16}, Lines{40, 30, 1}})
    test_spectral_norm(shape);
  for (const int64_t d : {1, 2, 3, 8, 17, 33, 64, 70, 256}) test_definite_trace(d);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
