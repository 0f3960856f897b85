// The passes of spectral_norm.h for one instruction set. Included like simd.h.

// Returns elements [first, first + count) as W: in place, or widened into `buffer`.
template <typename W>
FASTGAN_INLINE const W* widened(const Tagged& from, int64_t first, int64_t count, W* buffer) {
  switch (from.element) {
    case Element::kBFloat16:
      convert(static_cast<const BFloat16*>(from.data) + first, 0, 1, buffer, 0, 1, 1, count, W(1));
      return buffer;
    case Element::kHalf:
      convert(static_cast<const Half*>(from.data) + first, 0, 1, buffer, 0, 1, 1, count, W(1));
      return buffer;
    case Element::kDouble:
      if (sizeof(W) == sizeof(double)) break;
      convert(static_cast<const double*>(from.data) + first, 0, 1, buffer, 0, 1, 1, count, W(1));
      return buffer;
    case Element::kFloat:
      if (sizeof(W) == sizeof(float)) break;
      convert(static_cast<const float*>(from.data) + first, 0, 1, buffer, 0, 1, 1, count, W(1));
      return buffer;
  }
  return static_cast<const W*>(from.data) + first;
}

template <typename W>
FASTGAN_INLINE void narrowed(const W* values, const Tagged& to, int64_t first, int64_t count) {
  void* data = const_cast<void*>(to.data);
  switch (to.element) {
    case Element::kBFloat16: return convert(values, 0, 1, static_cast<BFloat16*>(data) + first, 0, 1, 1, count, W(1));
    case Element::kHalf: return convert(values, 0, 1, static_cast<Half*>(data) + first, 0, 1, 1, count, W(1));
    case Element::kDouble: return convert(values, 0, 1, static_cast<double*>(data) + first, 0, 1, 1, count, W(1));
    case Element::kFloat: return convert(values, 0, 1, static_cast<float*>(data) + first, 0, 1, 1, count, W(1));
  }
}

// A sum of products in four vectors plus a remainder.
template <typename W>
struct Accumulator {
  Vec<W> sums[4] = {};
  W rest = 0;

  FASTGAN_INLINE void add(const W* a, const W* b, int64_t count) {
    int64_t i = 0;
    for (; i + 4 * kWidth<W> <= count; i += 4 * kWidth<W>)
      for (int k = 0; k < 4; ++k) sums[k] += load(a + i + k * kWidth<W>) * load(b + i + k * kWidth<W>);
    for (; i + kWidth<W> <= count; i += kWidth<W>) sums[0] += load(a + i) * load(b + i);
    for (; i < count; ++i) rest += a[i] * b[i];
  }

  FASTGAN_INLINE W total() const { return sum_lanes<W>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest; }
};

template <typename W>
void spectral_norm_rows(const Product* operands, const Part* parts, int64_t begin, int64_t end) {
  W buffer[kBuffer];
  for (int64_t task = begin; task < end; ++task) {
    const Part& part = parts[task];
    const Product& x = operands[part.operand];
    const W* v = static_cast<const W*>(x.vector);
    for (int64_t r = part.first; r < part.first + part.count; ++r) {
      Accumulator<W> sum;
      for (int64_t block = 0; block < x.shape.blocks; ++block)
        for (int64_t k = 0; k < x.shape.length; k += kBuffer) {
          const int64_t count = smaller(kBuffer, x.shape.length - k);
          const W* w = widened(x.w, (block * x.shape.rows + r) * x.shape.length + k, count, buffer);
          sum.add(w, v + block * x.shape.length + k, count);
        }
      static_cast<W*>(x.out)[r] = sum.total();
    }
  }
}

// Takes the columns of one block in pieces, each over all rows.
template <typename W>
void spectral_norm_columns(const Product* operands, const Part* parts, int64_t begin, int64_t end) {
  W buffer[kBuffer], sums[kBuffer];
  for (int64_t task = begin; task < end; ++task) {
    const Part& part = parts[task];
    const Product& x = operands[part.operand];
    const int64_t length = x.shape.length, last = part.first + part.count;
    const W* u = static_cast<const W*>(x.vector);
    for (int64_t column = part.first; column < last;) {
      const int64_t block = column / length, k = column % length;
      const int64_t count = smaller(smaller(kBuffer, length - k), last - column);
      for (int64_t i = 0; i < count; ++i) sums[i] = 0;
      for (int64_t r = 0; r < x.shape.rows; ++r) {
        const W* w = widened(x.w, (block * x.shape.rows + r) * length + k, count, buffer);
        const W factor = u[r];
        for (int64_t i = 0; i < count; ++i) sums[i] += factor * w[i];
      }
      for (int64_t i = 0; i < count; ++i) static_cast<W*>(x.out)[column + i] = sums[i];
      column += count;
    }
  }
}

// Rows [r, r + kCount) of an iteration: read from memory for s and from the cache for W^T s.
template <int kCount, typename W>
FASTGAN_INLINE void iterate_rows(const Iteration& x, int64_t r, W* sums) {
  constexpr int64_t kPiece = 2 * kWidth<W>;
  W buffers[kCount][kBuffer];
  const W *v = static_cast<const W*>(x.v), *w[kCount];
  const int64_t length = x.shape.length;
  Vec<W> products[kCount][2] = {};
  W s[kCount] = {};
  for (int64_t block = 0; block < x.shape.blocks; ++block)
    for (int64_t k = 0; k < length; k += kBuffer) {
      const int64_t count = smaller(kBuffer, length - k);
      const W* right = v + block * length + k;
      for (int i = 0; i < kCount; ++i) w[i] = widened(x.w, (block * x.shape.rows + r + i) * length + k, count, buffers[i]);
      int64_t j = 0;
      for (; j + kPiece <= count; j += kPiece)
        for (int half = 0; half < 2; ++half) {
          const int64_t at = j + half * kWidth<W>;
          for (int i = 0; i < kCount; ++i) products[i][half] += load(w[i] + at) * load(right + at);
        }
      for (; j < count; ++j)
        for (int i = 0; i < kCount; ++i) s[i] += w[i][j] * right[j];
    }
  for (int i = 0; i < kCount; ++i) {
    s[i] += sum_lanes<W>(products[i][0] + products[i][1]);
    static_cast<W*>(x.s)[r + i] = s[i];
  }
  for (int64_t block = 0; block < x.shape.blocks; ++block)
    for (int64_t k = 0; k < length; k += kBuffer) {
      const int64_t count = smaller(kBuffer, length - k);
      W* sum = sums + block * length + k;
      for (int i = 0; i < kCount; ++i) w[i] = widened(x.w, (block * x.shape.rows + r + i) * length + k, count, buffers[i]);
      for (int64_t j = 0; j < count; ++j) {
        W total = sum[j];
        for (int i = 0; i < kCount; ++i) total += s[i] * w[i][j];
        sum[j] = total;
      }
    }
}

template <typename W>
void spectral_norm_iterate(const Iteration* operands, const Part* parts, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const Part& part = parts[task];
    const Iteration& x = operands[part.operand];
    const int64_t last = part.first + part.count;
    W* sums = static_cast<W*>(x.sums) + part.first / x.every * x.shape.columns();
    for (int64_t j = 0; j < x.shape.columns(); ++j) sums[j] = 0;
    int64_t r = part.first;
    for (; r + 4 <= last; r += 4) iterate_rows<4>(x, r, sums);
    for (; r < last; ++r) iterate_rows<1>(x, r, sums);
  }
}

template <typename W>
void spectral_norm_dots(const Dots* operands, const Part* parts, int64_t begin, int64_t end, double* sums) {
  W g_buffer[kBuffer], w_buffer[kBuffer], h_buffer[kBuffer];
  for (int64_t task = begin; task < end; ++task) {
    const Part& part = parts[task];
    const Dots& x = operands[part.operand];
    const W *u = static_cast<const W*>(x.u), *v = static_cast<const W*>(x.v);
    double gw = 0, hg = 0, huv = 0;
    for (int64_t line = part.first; line < part.first + part.count; ++line) {
      const int64_t block = line / x.shape.rows, r = line % x.shape.rows;
      Accumulator<W> line_gw, line_hg, line_huv;
      for (int64_t k = 0; k < x.shape.length; k += kBuffer) {
        const int64_t count = smaller(kBuffer, x.shape.length - k), first = line * x.shape.length + k;
        const W *g = widened(x.g, first, count, g_buffer), *w = widened(x.w, first, count, w_buffer);
        line_gw.add(g, w, count);
        if (!x.h.data) continue;
        const W* h = widened(x.h, first, count, h_buffer);
        line_hg.add(h, g, count);
        line_huv.add(h, v + block * x.shape.length + k, count);
      }
      gw += line_gw.total();
      hg += line_hg.total();
      huv += double(u[r]) * line_huv.total();
    }
    sums[3 * task] = gw;
    sums[3 * task + 1] = hg;
    sums[3 * task + 2] = huv;
  }
}

// Runs from the last task to the first, since the cache may still hold what the previous pass read last.
template <typename W>
void spectral_norm_combine(const Combination* operands, const Part* parts, int64_t begin, int64_t end) {
  W x_buffer[kBuffer], y_buffer[kBuffer], buffer[kBuffer];
  for (int64_t task = end; task-- > begin;) {
    const Part& part = parts[task];
    const Combination& c = operands[part.operand];
    const W sigma = W(c.sigma), p = W(c.p);
    const bool is_wide = c.out.element == (sizeof(W) == sizeof(double) ? Element::kDouble : Element::kFloat);
    for (int64_t line = part.first; line < part.first + part.count; ++line) {
      const int64_t block = line / c.shape.rows;
      const W q = c.u ? W(c.q * static_cast<const W*>(c.u)[line % c.shape.rows]) : 0;
      for (int64_t k = 0; k < c.shape.length; k += kBuffer) {
        const int64_t count = smaller(kBuffer, c.shape.length - k), first = line * c.shape.length + k;
        W* sum = is_wide ? static_cast<W*>(const_cast<void*>(c.out.data)) + first : buffer;
        if (c.x.data) {
          const W* x = widened(c.x, first, count, x_buffer);
          for (int64_t i = 0; i < count; ++i) sum[i] = x[i] / sigma;
        } else {
          for (int64_t i = 0; i < count; ++i) sum[i] = 0;
        }
        if (c.y.data) {
          const W* y = widened(c.y, first, count, y_buffer);
          for (int64_t i = 0; i < count; ++i) sum[i] += p * y[i];
        }
        if (c.u) {
          const W* v = static_cast<const W*>(c.v) + block * c.shape.length + k;
          for (int64_t i = 0; i < count; ++i) sum[i] += q * v[i];
        }
        if (!is_wide) narrowed(sum, c.out, first, count);
      }
    }
  }
}

template <typename W>
constexpr SpectralNormKernels spectral_norm_table() {
  return {spectral_norm_rows<W>, spectral_norm_columns<W>, spectral_norm_iterate<W>, spectral_norm_dots<W>,
          spectral_norm_combine<W>};
}
