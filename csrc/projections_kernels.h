// The passes of projections.h for one instruction set. Included like simd.h, after attention_kernels.h.

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

// The largest of four rows and its index: the first among equals, but the last NaN, as in torch.
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
FASTGAN_INLINE Matrix<T> weight_matrix(const View& weight) {
  return {static_cast<T*>(weight.data), weight.row, weight.channel};
}

template <typename T>
void gradients_pack(const ProjectionGradients& x, int64_t begin, int64_t end) {
  const int64_t stride = x.stride_of_channels();
  pack_rows<T>(weight_matrix<const T>(x.weight), begin, end - begin, x.channels, 1,
               static_cast<Wide<T>*>(x.packed.data) + begin * stride, stride);
}

// Packs tiles in their order in memory if either product can use it.
template <typename T>
void gradients(const ProjectionGradients& x, int64_t begin, int64_t end, void* room) {
  using W = Wide<T>;
  const int64_t o = x.outputs, c = x.channels, o_stride = x.stride_of_outputs(), c_stride = x.stride_of_channels();
  const int64_t tiles = ceil_div(x.pixels, kTile), chunk_tiles = ceil_div(x.tiles(), x.chunks());
  const W* weight = static_cast<const W*>(x.packed.data);
  W *dy = static_cast<W*>(room), *dy_t = dy + kTile * o_stride, *rows = dy_t + kTile * o_stride;
  W* dx = rows + kTile * c_stride;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    W* sums = part_of<W>(x.sums, chunk);
    const int64_t first_tile = smaller(chunk * chunk_tiles, x.tiles());
    const int64_t last_tile = smaller(first_tile + chunk_tiles, x.tiles());
    if (first_tile == last_tile)
      for (int64_t i = 0; i < x.sum_rows() * x.sum_stride(); ++i) sums[i] = 0;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t batch = tile / tiles, first = tile % tiles * kTile, count = smaller(kTile, x.pixels - first);
      const auto from_y = slice_of<const T>(x.dy, 1, batch), from_x = slice_of<const T>(x.x, 1, batch);
      const auto to = slice_of<T>(x.dx, 1, batch);
      const bool add = tile > first_tile;
      if (x.x_transposed()) {
        pack_rows<T>(from_y, first, count, o, 1, dy, o_stride);
        pack_tile<T>(from_y, first, count, o, 1, dy_t);
        pack_tile<T>(from_x, first, count, c, 1, rows);
        product<false>(rows, kTile, dy, o_stride, count, c, o, sums, o_stride, add);
        product<true>(weight, c_stride, dy_t, kTile, o, c, count, dx, kTile, false);
        unpack<T>(dx, 1, kTile, to, first, count, c, 1);
        continue;
      }
      pack_rows<T>(from_x, first, count, c, 1, rows, c_stride);
      if (x.dy_transposed()) {
        pack_tile<T>(from_y, first, count, o, 1, dy_t);
        product<false>(dy_t, kTile, rows, c_stride, count, o, c, sums, c_stride, add);
        product<true>(dy_t, kTile, weight, c_stride, o, count, c, dx, c_stride, false);
      } else {
        pack_rows<T>(from_y, first, count, o, 1, dy, o_stride);
        product<true>(dy, o_stride, rows, c_stride, count, o, c, sums, c_stride, add);
        product<false>(dy, o_stride, weight, c_stride, o, whole_rows(count), c, dx, c_stride, false);
      }
      unpack<T>(dx, c_stride, 1, to, first, count, c, 1);
    }
  }
}

template <typename T>
void gradients_sum(const ProjectionGradients& x, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const int64_t stride = x.sum_stride(), columns = x.x_transposed() ? x.outputs : x.channels;
  Matrix<T> to = weight_matrix<T>(x.dweight);
  if (x.x_transposed()) to = {to.data, to.channel, to.row};
  for (int64_t row = begin; row < end; ++row) {
    W* sum = part_of<W>(x.sums, 0) + row * stride;
    for (int64_t chunk = 1; chunk < x.chunks(); ++chunk) {
      const W* other = part_of<W>(x.sums, chunk) + row * stride;
      for (int64_t i = 0; i < columns; ++i) sum[i] += other[i];
    }
    unpack<T>(sum, stride, 1, to, row, 1, columns, 1);
  }
}

template <typename T>
constexpr ProjectionKernels projection_table() {
  return {pooled_pack<T>, pooled<T>, residual_pack<T>, residual<T>, gradients_pack<T>, gradients<T>, gradients_sum<T>};
}
