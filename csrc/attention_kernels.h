// The passes of attention.h for one instruction set. Included like simd.h, and after it.

template <typename T>
struct Matrix {  // of one slice
  T* data;
  int64_t row, channel;
  T* at(int64_t i) const { return data + i * row; }
};

template <typename T>
FASTGAN_INLINE Matrix<T> slice_of(const View& view, int64_t heads, int64_t slice) {
  T* data = static_cast<T*>(view.data) + slice / heads * view.batch + slice % heads * view.head;
  return {data, view.row, view.channel};
}

template <typename W>
FASTGAN_INLINE W* part_of(const Packed& packed, int64_t slice) {
  return static_cast<W*>(packed.data) + slice * packed.slice;
}

FASTGAN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Copies rows [first, first + count) times `factor` to rows of `stride` elements, padded with zeros.
template <typename T>
void pack_rows(const Matrix<const T>& from, int64_t first, int64_t count, int64_t channels, Wide<T> factor, Wide<T>* to,
               int64_t stride) {
  convert(from.at(first), from.row, from.channel, to, stride, 1, count, channels, factor);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = channels; j < stride; ++j) to[i * stride + j] = 0;
}

// The same for a tile of keys, transposed; missing keys become zero.
template <typename T>
void pack_tile(const Matrix<const T>& from, int64_t first, int64_t count, int64_t channels, Wide<T> factor,
               Wide<T>* to) {
  convert(from.at(first), from.row, from.channel, to, 1, kTile, count, channels, factor);
  for (int64_t j = 0; j < channels; ++j)
    for (int64_t i = count; i < kTile; ++i) to[j * kTile + i] = 0;
}

template <typename T>
void unpack(const Wide<T>* from, int64_t row, int64_t channel, const Matrix<T>& to, int64_t first, int64_t count,
            int64_t channels, Wide<T> factor) {
  convert(from, row, channel, to.at(first), to.row, to.channel, count, channels, factor);
}

// maps (rows, keys of a tile) <- a b^T, or + with `add`.
template <typename W>
FASTGAN_INLINE void tile_product(const W* a, int64_t channels, const W* packed_tile, int64_t rows, int64_t keys, W* map,
                                 int64_t stride, bool add = false) {
  product<false>(a, quads(channels), packed_tile, kTile, channels, rows, keys, map, stride, add);
}

// Gives no weight to the keys that only fill up the last vector.
template <typename W>
FASTGAN_INLINE void mask_tail(W* map, int64_t stride, int64_t rows, int64_t keys) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = keys; c < whole_vectors<W>(keys); ++c) map[r * stride + c] = -W(__builtin_inf());
}

// s <- exp(scale (s - top)); `scale` is in units of log(2).
template <typename W>
FASTGAN_INLINE Vec<W> weight(const W* s, W top, W scale) {
  return exp2_of_negative<W>((load(s) - top) * scale);
}

// The scale of the logits in the maps, in units of log(2).
template <typename W>
FASTGAN_INLINE W log_scale_of(const Masking& masking, const AttentionShape& s) {
  return W(masking.is_scaled() ? kLog2E : s.scale * kLog2E);
}

// The exponential of a head's sink relative to a row's largest logit.
template <typename W>
FASTGAN_INLINE W sink_weight(const Masking& masking, int64_t head, W top) {
  return exp2_of_negative<W>(broadcast<W>((static_cast<const W*>(masking.sinks)[head] - top) * W(kLog2E)))[0];
}

template <typename W>
FASTGAN_INLINE void fill_unseen(const uint8_t* __restrict seen, int64_t row, int64_t column, int64_t rows, int64_t keys,
                                W value, W* __restrict map, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < keys; ++c)
      map[r * stride + c] = seen[r * row + c * column] ? map[r * stride + c] : value;
}

template <typename X, typename W>
FASTGAN_INLINE void scale_and_add(const X* __restrict added, int64_t row, int64_t column, W scale, int64_t rows,
                                  int64_t keys, W* __restrict map, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < keys; ++c)
      map[r * stride + c] = scale * map[r * stride + c] + W(widen(added[r * row + c * column]));
}

// Rows [first, first + rows) and keys [key, key + keys) of the maps of a slice.
struct Block {
  int64_t slice, first, rows, key, keys;

  FASTGAN_INLINE int64_t offset(const View& mask, int64_t heads) const {
    return slice / heads * mask.batch + slice % heads * mask.head + first * mask.row + key * mask.channel;
  }
};

// map <- `value` if a boolean mask or causal attention hides the key, even if the map is NaN, like torch's masked_fill.
template <typename W>
void fill_hidden(const Masking& x, const AttentionShape& s, const Block& b, W value, W* map, int64_t stride) {
  if (x.mask.data && x.is_boolean) {
    const auto* seen = static_cast<const uint8_t*>(x.mask.data) + b.offset(x.mask, s.heads);
    if (x.mask.channel == 1)
      fill_unseen(seen, x.mask.row, 1, b.rows, b.keys, value, map, stride);
    else
      fill_unseen(seen, x.mask.row, x.mask.channel, b.rows, b.keys, value, map, stride);
  }
  if (!s.is_causal) return;
  for (int64_t r = 0; r < b.rows; ++r)
    for (int64_t c = b.first + r < b.key ? 0 : b.first + r + 1 - b.key; c < b.keys; ++c) map[r * stride + c] = value;
}

// Scales the logits if Masking::is_scaled, and masks them.
template <typename W>
void mask_logits(const Masking& x, const AttentionShape& s, const Block& b, W* map, int64_t stride) {
  const W scale = W(s.scale);
  const auto add = [&](const auto* mask) __attribute__((always_inline)) {
    if (x.mask.channel == 1)
      scale_and_add(mask, x.mask.row, 1, scale, b.rows, b.keys, map, stride);
    else
      scale_and_add(mask, x.mask.row, x.mask.channel, scale, b.rows, b.keys, map, stride);
  };
  if (x.is_added()) {
    FASTGAN_FOR_ELEMENTS(x.element, x.mask.data, b.offset(x.mask, s.heads), add)
  } else if (x.is_scaled()) {
    for (int64_t r = 0; r < b.rows; ++r)
      for (int64_t c = 0; c < b.keys; ++c) map[r * stride + c] *= scale;
  }
  fill_hidden(x, s, b, -W(__builtin_inf()), map, stride);
}

template <typename T>
void attention_forward_pack(const AttentionForward& x, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const AttentionShape& s = x.shape;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / s.tiles(), first = task % s.tiles() * kTile, count = smaller(kTile, s.m - first);
    const auto k = slice_of<const T>(x.k, s.key_heads, slice), v = slice_of<const T>(x.v, s.key_heads, slice);
    pack_tile<T>(k, first, count, s.d, W(1), part_of<W>(x.kt, slice) + first * s.d);
    pack_rows<T>(v, first, count, s.e, W(1), part_of<W>(x.v_rows, slice) + first * padded(s.e), padded(s.e));
  }
}

// Replaces a row of logits by exponentials; `stats` receives the largest logit and 1 / the sum of the exponentials.
template <typename W>
FASTGAN_INLINE void softmax_row(W* row, int64_t keys, W scale, const Masking& masking, int64_t head, W* stats) {
  Vec<W> largest = broadcast<W>(-W(__builtin_inf())), sum{};
  for (int64_t c = 0; c < keys; c += kWidth<W>) {
    const Vec<W> logits = load(row + c);
    largest = logits > largest ? logits : largest;
  }
  W top = max_lanes<W>(largest);
  if (masking.sinks) {
    const W sink = static_cast<const W*>(masking.sinks)[head];
    top = sink > top ? sink : top;
  } else if (masking.mask.data && top == -W(__builtin_inf())) {
    top = 0;
  }
  for (int64_t c = 0; c < keys; c += kWidth<W>) {
    const Vec<W> p = weight(row + c, top, scale);
    store(row + c, p);
    sum += p;
  }
  const W total = sum_lanes<W>(sum) + (masking.sinks ? sink_weight<W>(masking, head, top) : 0);
  stats[0] = top;
  stats[1] = total == 0 ? 0 : 1 / total;
}

template <typename T>
void attention_forward(const AttentionForward& x, int64_t begin, int64_t end, void* room) {
  using W = Wide<T>;
  const AttentionShape& s = x.shape;
  const int64_t stride = map_stride(s), width = padded(s.e);
  W *q = static_cast<W*>(room), *map = q + kStrip * quads(s.d), *sums = map + kStrip * stride;
  const W scale = log_scale_of<W>(x.masking, s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / s.strips(), first = s.nth(task % s.strips(), s.strips()) * kStrip;
    const int64_t rows = smaller(kStrip, s.n - first), computed = whole_rows(rows), seen = s.seen(first, rows);
    const W *kt = part_of<W>(x.kt, slice / s.sharing()), *v = part_of<W>(x.v_rows, slice / s.sharing());
    W* stats = static_cast<W*>(x.stats) + 2 * (slice * s.n + first);
    for (int64_t i = 0; i < computed * quads(s.d); ++i) q[i] = 0;
    pack_rows<T>(slice_of<const T>(x.q, s.heads, slice), first, rows, s.d, W(1), q, quads(s.d));
    for (int64_t key = 0; key < seen; key += kTile)
      tile_product(q, s.d, kt + key * s.d, computed, smaller(kTile, seen - key), map + key, stride);
    mask_logits(x.masking, s, {slice, first, rows, 0, seen}, map, stride);
    mask_tail(map, stride, computed, seen);
    for (int64_t r = 0; r < rows; ++r)
      softmax_row(map + r * stride, seen, scale, x.masking, slice % s.heads, stats + 2 * r);
    product<false>(map, stride, v, width, seen, computed, s.e, sums, width, false);
    const auto o = slice_of<T>(x.o, s.heads, slice);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < width; ++j) sums[r * width + j] *= stats[2 * r + 1];
    unpack<T>(sums, width, 1, o, first, rows, s.e, W(1));
  }
}

template <typename T>
void attention_backward_pack_keys(const AttentionBackward& x, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const AttentionShape& s = x.shape;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / s.tiles(), first = task % s.tiles() * kTile, count = smaller(kTile, s.m - first);
    const auto k = slice_of<const T>(x.k, s.key_heads, slice), v = slice_of<const T>(x.v, s.key_heads, slice);
    pack_tile<T>(k, first, count, s.d, W(1), part_of<W>(x.kt, slice) + first * s.d);
    pack_tile<T>(v, first, count, s.e, W(1), part_of<W>(x.vt, slice) + first * s.e);
    pack_rows<T>(k, first, count, s.d, W(1), part_of<W>(x.k_rows, slice) + first * padded(s.d), padded(s.d));
  }
}

// Missing rows become zero.
template <typename T>
void pack_strip(const Matrix<const T>& from, int64_t first, int64_t rows, int64_t channels, Wide<T> factor,
                Wide<T>* to) {
  const int64_t stride = quads(channels);
  pack_rows<T>(from, first, rows, channels, factor, to, stride);
  for (int64_t i = rows * stride; i < kStrip * stride; ++i) to[i] = 0;
}

template <typename T>
void attention_backward_pack_rows(const AttentionBackward& x, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const AttentionShape& s = x.shape;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / s.strips(), first = task % s.strips() * kStrip, rows = smaller(kStrip, s.n - first);
    const auto o = slice_of<const T>(x.o, s.heads, slice);
    const W* stats = static_cast<const W*>(x.stats) + 2 * (slice * s.n + first);
    W* go = part_of<W>(x.go_rows, slice) + first * quads(s.e);
    pack_strip<T>(slice_of<const T>(x.q, s.heads, slice), first, rows, s.d, W(1), part_of<W>(x.q_rows, slice) + first * quads(s.d));
    pack_strip<T>(slice_of<const T>(x.grad_o, s.heads, slice), first, rows, s.e, W(1), go);
    for (int64_t r = 0; r < rows; ++r) {
      W delta = 0, not_finite = 0, *row = go + r * quads(s.e);
      for (int64_t j = 0; j < s.e; ++j) {
        row[j] *= stats[2 * r + 1];
        delta += row[j] * widen(o.data[(first + r) * o.row + j * o.channel]);
        not_finite += 0 * row[j];
      }
      part_of<W>(x.tops, slice)[first + r] = stats[2 * r];
      delta += not_finite;  // NaN: an infinite cotangent makes a row of dP with entries of both signs
      part_of<W>(x.deltas, slice)[first + r] = delta;
      if (x.masking.sinks)  // the sink is a key with dP = 0
        part_of<W>(x.sink_terms, slice)[first + r] = -delta * sink_weight<W>(x.masking, slice % s.heads, stats[2 * r]);
    }
  }
}

template <typename T>
void attention_backward(const AttentionBackward& x, int64_t begin, int64_t end, void* room) {
  using W = Wide<T>;
  const AttentionShape& s = x.shape;
  const int64_t groups = s.groups(), group_tiles = ceil_div(s.tiles(), groups);
  W *p = static_cast<W*>(room), *ds = p + kRowBlock * kTile, *dk = ds + kRowBlock * kTile, *dv = dk + padded(s.d) * kTile;
  const W scale = log_scale_of<W>(x.masking, s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t key_slice = task / groups, group = s.nth(task % groups, groups);
    const int64_t first_tile = group * group_tiles, last_tile = smaller(s.tiles(), first_tile + group_tiles);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t key = tile * kTile, keys = smaller(kTile, s.m - key), first_row = smaller(s.first_row(key), s.n);
      const W *kt = part_of<W>(x.kt, key_slice) + key * s.d, *vt = part_of<W>(x.vt, key_slice) + key * s.e;
      const W* k = part_of<W>(x.k_rows, key_slice) + key * padded(s.d);
      for (int64_t i = 0; i < (padded(s.d) + padded(s.e)) * kTile; ++i) dk[i] = 0;  // and dv
      for (int64_t slice = key_slice * s.sharing(); slice < (key_slice + 1) * s.sharing(); ++slice) {
        const W *q = part_of<W>(x.q_rows, slice), *go = part_of<W>(x.go_rows, slice);
        const W *tops = part_of<W>(x.tops, slice), *deltas = part_of<W>(x.deltas, slice);
        W* dq = part_of<W>(x.dq_groups, slice) + group * s.padded_n() * padded(s.d);
        if (tile == first_tile)
          for (int64_t i = 0; i < first_row * padded(s.d); ++i) dq[i] = 0;
        for (int64_t n = first_row; n < s.n; n += kRowBlock) {
          const int64_t rows = smaller(kRowBlock, s.n - n), computed = whole_rows(rows);
          tile_product(q + n * quads(s.d), s.d, kt, computed, keys, p, kTile);
          tile_product(go + n * quads(s.e), s.e, vt, computed, keys, ds, kTile);
          const Block block{slice, n, rows, key, keys};
          mask_logits(x.masking, s, block, p, kTile);
          mask_tail(p, kTile, rows, keys);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = r * kTile; c < r * kTile + keys; c += kWidth<W>) {
              const Vec<W> e = weight(p + c, tops[n + r], scale);
              store(p + c, e);
              store(ds + c, e * (load(ds + c) - deltas[n + r]));
            }
          fill_hidden(x.masking, s, block, W(0), ds, kTile);
          product<false>(ds, kTile, k, padded(s.d), keys, computed, s.d, dq + n * padded(s.d), padded(s.d),
                         tile > first_tile);
          product<true>(q + n * quads(s.d), quads(s.d), ds, kTile, rows, s.d, keys, dk, kTile, true);
          product<true>(go + n * quads(s.e), quads(s.e), p, kTile, rows, s.e, keys, dv, kTile, true);
        }
      }
      unpack<T>(dk, 1, kTile, slice_of<T>(x.dk, s.key_heads, key_slice), key, keys, s.d, W(s.scale));
      unpack<T>(dv, 1, kTile, slice_of<T>(x.dv, s.key_heads, key_slice), key, keys, s.e, W(1));
    }
  }
}

template <typename T>
void attention_backward_sum(const AttentionBackward& x, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const AttentionShape& s = x.shape;
  const int64_t width = padded(s.d), group_size = s.padded_n() * width;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / s.strips(), first = task % s.strips() * kStrip, rows = smaller(kStrip, s.n - first);
    W* sum = part_of<W>(x.dq_groups, slice) + first * width;
    for (int64_t group = 1; group < s.groups(); ++group)
      for (int64_t i = 0; i < rows * width; ++i) sum[i] += sum[group * group_size + i];
    unpack<T>(sum, width, 1, slice_of<T>(x.dq, s.heads, slice), first, rows, s.d, W(s.scale));
  }
}

// Per head: sums the contributions of its queries to the gradient of its sink.
template <typename W>
FASTGAN_INLINE void sum_sinks(const AttentionShape& s, const Packed& terms, void* sums, int64_t begin, int64_t end) {
  for (int64_t head = begin; head < end; ++head) {
    double sum = 0;
    for (int64_t batch = 0; batch < s.batches; ++batch) {
      const W* rows = part_of<W>(terms, batch * s.heads + head);
      for (int64_t n = 0; n < s.n; ++n) sum += rows[n];
    }
    static_cast<W*>(sums)[head] = W(sum);
  }
}

template <typename T>
void attention_backward_sinks(const AttentionBackward& x, int64_t begin, int64_t end) {
  sum_sinks<Wide<T>>(x.shape, x.sink_terms, x.d_sinks, begin, end);
}

// A tile of keys, both transposed and as rows.
template <typename T>
void pack_both(const Matrix<const T>& from, int64_t first, int64_t count, int64_t channels, Wide<T> factor,
               Wide<T>* tiles, Wide<T>* rows) {
  const int64_t width = padded(channels);
  pack_tile<T>(from, first, count, channels, factor, tiles + first * channels);
  pack_rows<T>(from, first, count, channels, factor, rows + first * width, width);
}

template <typename T>
void attention_backward2_pack_keys(const AttentionBackward2& x, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const AttentionShape& s = x.shape;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / s.tiles(), first = task % s.tiles() * kTile, count = smaller(kTile, s.m - first);
    pack_both<T>(slice_of<const T>(x.k, s.key_heads, slice), first, count, s.d, W(1), part_of<W>(x.kt, slice),
                 part_of<W>(x.k_rows, slice));
    pack_both<T>(slice_of<const T>(x.v, s.key_heads, slice), first, count, s.e, W(1), part_of<W>(x.vt, slice),
                 part_of<W>(x.v_rows, slice));
    if (x.ggk.data)
      pack_both<T>(slice_of<const T>(x.ggk, s.key_heads, slice), first, count, s.d, W(s.scale),
                   part_of<W>(x.ggkt, slice), part_of<W>(x.ggk_rows, slice));
    if (x.ggv.data)
      pack_both<T>(slice_of<const T>(x.ggv, s.key_heads, slice), first, count, s.e, W(1), part_of<W>(x.ggvt, slice),
                   part_of<W>(x.ggv_rows, slice));
  }
}

// Maps of rows x keys: the logits, which become weights P; dP = dO V^T; A = ggq K^T + Q ggk^T, of
// ggq and ggk times the scale; T = dO ggv^T. Parts of a ggk or ggv that is null are left out.
template <typename W>
struct Maps {
  W *p, *dp, *a, *t;
  int64_t stride;

  Maps(W* room, int64_t rows, int64_t columns)
      : p(room), dp(p + rows * columns), a(dp + rows * columns), t(a + rows * columns), stride(columns) {}

  FASTGAN_INLINE void fill(const AttentionBackward2& x, int64_t key_slice, const W* q, const W* ggq, const W* go,
                           int64_t rows, int64_t key, int64_t keys, int64_t column) {
    const AttentionShape& s = x.shape;
    const W *kt = part_of<W>(x.kt, key_slice) + key * s.d, *vt = part_of<W>(x.vt, key_slice) + key * s.e;
    tile_product(q, s.d, kt, rows, keys, p + column, stride);
    tile_product(ggq, s.d, kt, rows, keys, a + column, stride);
    if (x.ggk.data)
      tile_product(q, s.d, part_of<W>(x.ggkt, key_slice) + key * s.d, rows, keys, a + column, stride, true);
    tile_product(go, s.e, vt, rows, keys, dp + column, stride);
    if (x.ggv.data)
      return tile_product(go, s.e, part_of<W>(x.ggvt, key_slice) + key * s.e, rows, keys, t + column, stride);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kTile; ++c) t[r * stride + column + c] = 0;
  }

  // The logits and their cotangent.
  FASTGAN_INLINE void mask(const AttentionBackward2& x, const Block& block) const {
    mask_logits(x.masking, x.shape, block, p, stride);
    mask_tail(p, stride, block.rows, block.keys);
    fill_hidden(x.masking, x.shape, block, W(0), a, stride);
  }

  // The gradients with respect to the logits, once finish_row has written them.
  FASTGAN_INLINE void mask_gradients(const AttentionBackward2& x, const Block& block) const {
    fill_hidden(x.masking, x.shape, block, W(0), dp, stride);
    fill_hidden(x.masking, x.shape, block, W(0), t, stride);
  }
};

// Per row: 2 statistics of P, then delta = rowsum(P dP), a = rowsum(P A) and b = rowsum(P B), where
// B = (A - a) (dP - delta) + T.
template <typename W>
struct RowSums {
  W top, inverse, delta, a, b;
};

// Overwrites a row's maps: dP <- dS = P (dP - delta), T <- scale S2 = scale P (B - b), A <- E = P (A - a).
template <typename W>
FASTGAN_INLINE void finish_row(const Maps<W>& maps, int64_t row, int64_t keys, const RowSums<W>& sums, W scale) {
  for (int64_t c = row * maps.stride; c < row * maps.stride + keys; c += kWidth<W>) {
    const Vec<W> p = load(maps.p + c), centred = load(maps.dp + c) - sums.delta, a = load(maps.a + c) - sums.a;
    store(maps.t + c, p * scale * (a * centred + load(maps.t + c) - sums.b));
    store(maps.a + c, p * a);
    store(maps.dp + c, p * centred);
  }
}

// Replaces the logits by P and computes the sums of a row. A sink is a column with A = gg_sink, dP = T = 0 and the
// weight `share`. Returns the row's contribution to the sink's gradient.
template <typename W>
FASTGAN_INLINE W sum_row(const Maps<W>& maps, int64_t row, int64_t keys, RowSums<W>& sums, W log_scale, W share,
                         W gg_sink) {
  const int64_t begin = row * maps.stride, end = begin + keys;
  Vec<W> delta{}, a{}, b{};
  for (int64_t c = begin; c < end; c += kWidth<W>) {
    const Vec<W> p = weight(maps.p + c, sums.top, log_scale) * sums.inverse;
    store(maps.p + c, p);
    delta += p * load(maps.dp + c);
    a += p * load(maps.a + c);
  }
  sums.delta = sum_lanes<W>(delta);
  sums.a = sum_lanes<W>(a) + share * gg_sink;
  for (int64_t c = begin; c < end; c += kWidth<W>) {
    const Vec<W> centred = load(maps.dp + c) - sums.delta;
    b += load(maps.p + c) * ((load(maps.a + c) - sums.a) * centred + load(maps.t + c));
  }
  const W b_sink = (sums.a - gg_sink) * sums.delta;
  sums.b = sum_lanes<W>(b) + share * b_sink;
  return share * (b_sink - sums.b);
}

template <typename T>
void attention_backward2_rows(const AttentionBackward2& x, int64_t begin, int64_t end, void* room) {
  using W = Wide<T>;
  const AttentionShape& s = x.shape;
  const int64_t stride = map_stride(s), wide_d = padded(s.d), wide_e = padded(s.e);
  Maps<W> maps(static_cast<W*>(room), kStrip, stride);
  W *gq = maps.t + kStrip * stride, *g_do = gq + kStrip * wide_d;
  const W scale = W(s.scale), log_scale = log_scale_of<W>(x.masking, s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / s.strips(), first = s.nth(task % s.strips(), s.strips()) * kStrip;
    const int64_t rows = smaller(kStrip, s.n - first), computed = whole_rows(rows), seen = s.seen(first, rows);
    const int64_t key_slice = slice / s.sharing(), head = slice % s.heads;
    W *q = part_of<W>(x.q_rows, slice) + first * quads(s.d), *ggq = part_of<W>(x.ggq_rows, slice) + first * quads(s.d);
    W* go = part_of<W>(x.go_rows, slice) + first * quads(s.e);
    pack_strip<T>(slice_of<const T>(x.q, s.heads, slice), first, rows, s.d, W(1), q);
    pack_strip<T>(slice_of<const T>(x.ggq, s.heads, slice), first, rows, s.d, scale, ggq);
    pack_strip<T>(slice_of<const T>(x.grad_o, s.heads, slice), first, rows, s.e, W(1), go);
    for (int64_t key = 0; key < seen; key += kTile)
      maps.fill(x, key_slice, q, ggq, go, computed, key, smaller(kTile, seen - key), key);
    const Block block{slice, first, rows, 0, seen};
    maps.mask(x, block);
    const W* stats = static_cast<const W*>(x.stats) + 2 * (slice * s.n + first);
    auto* sums = reinterpret_cast<RowSums<W>*>(part_of<W>(x.sums, slice)) + first;
    for (int64_t r = 0; r < rows; ++r) {
      sums[r].top = stats[2 * r];
      sums[r].inverse = stats[2 * r + 1];
      if (x.masking.sinks) {
        const W share = sink_weight<W>(x.masking, head, sums[r].top) * sums[r].inverse;
        const W gg_sink = static_cast<const W*>(x.gg_sinks)[head];
        part_of<W>(x.sink_terms, slice)[first + r] = sum_row(maps, r, seen, sums[r], log_scale, share, gg_sink);
      } else {
        sum_row(maps, r, seen, sums[r], log_scale, W(0), W(0));
      }
      finish_row(maps, r, seen, sums[r], scale);
    }
    maps.mask_gradients(x, block);
    const W *k = part_of<W>(x.k_rows, key_slice), *v = part_of<W>(x.v_rows, key_slice);
    product<false>(maps.t, stride, k, wide_d, seen, computed, s.d, gq, wide_d, false);
    if (x.ggk.data)
      product<false>(maps.dp, stride, part_of<W>(x.ggk_rows, key_slice), wide_d, seen, computed, s.d, gq, wide_d, true);
    product<false>(maps.a, stride, v, wide_e, seen, computed, s.e, g_do, wide_e, false);
    if (x.ggv.data)
      product<false>(maps.p, stride, part_of<W>(x.ggv_rows, key_slice), wide_e, seen, computed, s.e, g_do, wide_e, true);
    unpack<T>(gq, wide_d, 1, slice_of<T>(x.gq, s.heads, slice), first, rows, s.d, W(1));
    unpack<T>(g_do, wide_e, 1, slice_of<T>(x.g_do, s.heads, slice), first, rows, s.e, W(1));
  }
}

template <typename T>
void attention_backward2_keys(const AttentionBackward2& x, int64_t begin, int64_t end, void* room) {
  using W = Wide<T>;
  const AttentionShape& s = x.shape;
  Maps<W> maps(static_cast<W*>(room), kStrip2, kTile);
  W *gk = maps.t + kStrip2 * kTile, *gv = gk + padded(s.d) * kTile;
  const W scale = W(s.scale), log_scale = log_scale_of<W>(x.masking, s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t key_slice = task / s.tiles(), key = s.nth(task % s.tiles(), s.tiles()) * kTile;
    const int64_t keys = smaller(kTile, s.m - key);
    for (int64_t i = 0; i < (padded(s.d) + padded(s.e)) * kTile; ++i) gk[i] = 0;  // and gv
    for (int64_t slice = key_slice * s.sharing(); slice < (key_slice + 1) * s.sharing(); ++slice) {
      const W *q = part_of<W>(x.q_rows, slice), *ggq = part_of<W>(x.ggq_rows, slice), *go = part_of<W>(x.go_rows, slice);
      const auto* sums = reinterpret_cast<const RowSums<W>*>(part_of<W>(x.sums, slice));
      for (int64_t n = s.first_row(key); n < s.n; n += kStrip2) {
        const int64_t rows = smaller(kStrip2, s.n - n), computed = whole_rows(rows);
        const W *q_rows = q + n * quads(s.d), *ggq_rows = ggq + n * quads(s.d), *go_rows = go + n * quads(s.e);
        maps.fill(x, key_slice, q_rows, ggq_rows, go_rows, computed, key, keys, 0);
        const Block block{slice, n, rows, key, keys};
        maps.mask(x, block);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = r * kTile; c < r * kTile + keys; c += kWidth<W>)
            store(maps.p + c, weight(maps.p + c, sums[n + r].top, log_scale) * sums[n + r].inverse);
          finish_row(maps, r, keys, sums[n + r], scale);
        }
        maps.mask_gradients(x, block);
        product<true>(q_rows, quads(s.d), maps.t, kTile, rows, s.d, keys, gk, kTile, true);
        product<true>(ggq_rows, quads(s.d), maps.dp, kTile, rows, s.d, keys, gk, kTile, true);
        product<true>(go_rows, quads(s.e), maps.a, kTile, rows, s.e, keys, gv, kTile, true);
      }
    }
    unpack<T>(gk, 1, kTile, slice_of<T>(x.gk, s.key_heads, key_slice), key, keys, s.d, W(1));
    unpack<T>(gv, 1, kTile, slice_of<T>(x.gv, s.key_heads, key_slice), key, keys, s.e, W(1));
  }
}

template <typename T>
void attention_backward2_sinks(const AttentionBackward2& x, int64_t begin, int64_t end) {
  sum_sinks<Wide<T>>(x.shape, x.sink_terms, x.g_sinks, begin, end);
}

template <typename T>
constexpr AttentionKernels attention_table() {
  return {attention_forward_pack<T>,    attention_forward<T>,      attention_backward_pack_keys<T>,
          attention_backward_pack_rows<T>, attention_backward<T>,  attention_backward_sum<T>,
          attention_backward_sinks<T>,  attention_backward2_pack_keys<T>, attention_backward2_rows<T>,
          attention_backward2_keys<T>,  attention_backward2_sinks<T>};
}
