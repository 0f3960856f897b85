// The passes of projections.h for one instruction set; included as simd.h is, behind attention_kernels.h.

template <typename T>
void pooled_pack(const PooledProjection& x, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const int64_t width = padded(x.outputs);
  W *weight = static_cast<W*>(x.weight_t.data), *biases = static_cast<W*>(x.biases.data);
  const T* from = static_cast<const T*>(x.weight.data);
  convert(from + begin * x.weight.channel, x.weight.channel, x.weight.row, weight + begin * width, width, 1,
          end - begin, x.outputs, W(1));
  for (int64_t c = begin; c < end; ++c)
    for (int64_t o = x.outputs; o < width; ++o) weight[c * width + o] = 0;
  if (begin > 0) return;
  const T* bias = static_cast<const T*>(x.bias.data);
  for (int64_t o = 0; o < width; ++o) biases[o] = bias && o < x.outputs ? widen(bias[o * x.bias.row]) : 0;
}

// The largest of four rows, and which it was: the first of equals, and the last that is not a number, as in torch.
template <typename T, typename W>
FASTGAN_INLINE void pool(const W* const (&rows)[4], int64_t channels, T* largest, int64_t stride, int8_t* index) {
  for (int64_t c = 0; c < channels; c += kWidth<W>) {
    Vec<W> best = load(rows[0] + c);
    auto which = best != best;
    which = which & 0;
    for (int k = 1; k < 4; ++k) {
      const Vec<W> other = load(rows[k] + c);
      const auto taken = (other > best) | (other != other);
      best = taken ? other : best;
      which = taken ? (which & 0) + k : which;
    }
    const int64_t count = smaller(kWidth<W>, channels - c);
    for (int64_t i = 0; i < count; ++i) {
      narrow(best[i], &largest[(c + i) * stride]);
      index[c + i] = int8_t(which[i]);
    }
  }
}

template <typename T>
void pooled(const PooledProjection& x, int64_t begin, int64_t end, void* room) {
  using W = Wide<T>;
  const int64_t width = padded(x.outputs), pooled_channels = x.outputs - x.d, stride = 2 * kTileColumns;
  const int64_t tile_columns = ceil_div(x.width, kTileColumns), pooled_width = x.width / 2;
  const W *weight = static_cast<const W*>(x.weight_t.data), *biases = static_cast<const W*>(x.biases.data);
  W *pixels = static_cast<W*>(room), *y = pixels + stride * x.channels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / x.tiles(), tile = task % x.tiles();
    const int64_t h = 2 * (tile / tile_columns), w = kTileColumns * (tile % tile_columns);
    const int64_t rows = smaller(2, x.height - h), columns = smaller(kTileColumns, x.width - w);
    if (rows < 2 || columns < kTileColumns)
      for (int64_t i = 0; i < stride * x.channels; ++i) pixels[i] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const auto pack = [&](const auto* from) __attribute__((always_inline)) {
        convert(from, x.x.channel, x.x.column, pixels + r * kTileColumns, stride, 1, x.channels, columns, W(1));
      };
      FASTGAN_FOR_ELEMENTS(x.x.element, x.x.data, batch * x.x.batch + (h + r) * x.x.row + w * x.x.column, pack)
    }
    for (int64_t p = 0; p < rows * kTileColumns; ++p)
      for (int64_t o = 0; o < width; ++o) y[p * width + o] = biases[o];
    product<true>(pixels, stride, weight, width, x.channels, rows * kTileColumns, x.outputs, y, width, true);
    T* q = static_cast<T*>(x.q.data) + batch * x.q.batch;
    for (int64_t r = 0; r < rows; ++r)
      convert(y + r * kTileColumns * width, width, 1, q + ((h + r) * x.width + w) * x.q.row, x.q.row, x.q.channel,
              columns, x.d, W(1));
    if (rows < 2) continue;
    for (int64_t j = 0; j + 1 < columns; j += 2) {
      const int64_t pixel = h / 2 * pooled_width + (w + j) / 2;
      const W *above = y + j * width + x.d, *below = above + kTileColumns * width;
      pool({above, above + width, below, below + width}, pooled_channels,
           static_cast<T*>(x.kv.data) + batch * x.kv.batch + pixel * x.kv.row, x.kv.channel,
           x.index + (batch * (x.height / 2) * pooled_width + pixel) * pooled_channels);
    }
  }
}

template <typename T>
void residual_pack(const ProjectionResidual& x, int64_t begin, int64_t end) {
  using W = Wide<T>;
  W *packed = static_cast<W*>(x.packed.data), *biases = static_cast<W*>(x.biases.data);
  const T* from = static_cast<const T*>(x.weight.data) + begin * x.weight.row;
  const int64_t width = x.channels_last() ? padded(x.channels) : quads(x.e);
  W* to = packed + begin * (x.channels_last() ? 1 : width);
  convert(from, x.weight.row, x.weight.channel, to, x.channels_last() ? 1 : width, x.channels_last() ? width : 1,
          end - begin, x.e, W(1));
  const T* bias = static_cast<const T*>(x.bias.data);
  for (int64_t c = begin; c < end; ++c) biases[c] = bias ? widen(bias[c * x.bias.row]) : 0;
}

// y <- x + sums, the sums of (rows, columns).
template <typename X, typename W>
FASTGAN_INLINE void add_rows(const W* sums, int64_t stride, const X* x, int64_t x_row, int64_t x_column, X* y,
                             int64_t y_row, int64_t y_column, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      narrow(sums[i * stride + j] + widen(x[i * x_row + j * x_column]), &y[i * y_row + j * y_column]);
}

template <typename X, typename W>
void add_image(const W* sums, int64_t stride, const X* x, int64_t x_row, int64_t x_column, X* y, int64_t y_row,
               int64_t y_column, int64_t rows, int64_t columns) {
  if (x_column == 1 && y_column == 1)
    add_rows(sums, stride, x, x_row, 1, y, y_row, 1, rows, columns);
  else
    add_rows(sums, stride, x, x_row, x_column, y, y_row, y_column, rows, columns);
}

template <typename T>
void residual(const ProjectionResidual& x, int64_t begin, int64_t end, void* room) {
  using W = Wide<T>;
  const W *weight = static_cast<const W*>(x.packed.data), *biases = static_cast<const W*>(x.biases.data);
  const bool last = x.channels_last();
  const int64_t width = last ? padded(x.channels) : kTile, depth = last ? quads(x.e) : kTile;
  W *rows = static_cast<W*>(room), *sums = rows + kTile * padded(x.e);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / x.tiles(), first = task % x.tiles() * kTile, count = smaller(kTile, x.pixels - first);
    const T* from = static_cast<const T*>(x.rows.data) + batch * x.rows.batch + first * x.rows.row;
    if (count < kTile)
      for (int64_t i = 0; i < kTile * padded(x.e); ++i) rows[i] = 0;
    convert(from, x.rows.row, x.rows.channel, rows, last ? depth : 1, last ? 1 : depth, count, x.e, W(1));
    if (last) {
      for (int64_t p = 0; p < count; ++p)
        for (int64_t c = 0; c < x.channels; ++c) sums[p * width + c] = biases[c];
      product<false>(rows, depth, weight, width, x.e, whole_rows(count), x.channels, sums, width, true);
    } else {
      for (int64_t c = 0; c < x.channels; ++c)
        for (int64_t p = 0; p < kTile; ++p) sums[c * width + p] = biases[c];
      product<false>(weight, quads(x.e), rows, depth, x.e, whole_rows(x.channels), count, sums, width, true);
    }
    const int64_t from_offset = batch * x.x.batch + first * x.x.column;
    const int64_t to_offset = batch * x.y.batch + first * x.y.column;
    const auto add = [&](auto* image) __attribute__((always_inline)) {
      auto* y = static_cast<decltype(image)>(x.y.data) + to_offset;
      if (last)
        add_image(sums, width, image, x.x.column, x.x.channel, y, x.y.column, x.y.channel, count, x.channels);
      else
        add_image(sums, width, image, x.x.channel, x.x.column, y, x.y.channel, x.y.column, x.channels, count);
    };
    FASTGAN_FOR_ELEMENTS(x.x.element, x.x.data, from_offset, add)
  }
}

template <typename T>
constexpr ProjectionKernels projection_table() {
  return {pooled_pack<T>, pooled<T>, residual_pack<T>, residual<T>};
}
