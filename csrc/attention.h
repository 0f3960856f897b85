// Attention O = softmax(scale Q K^T) V and its first and second gradients on a CPU: the data that the operators
// (attention.cpp) pass to the kernels (attention_kernels.h). Does not depend on torch.
//
// Each pass first packs its operands, in float or double. Keys are packed in tiles of kTile, either transposed
// (channels x kTile, one tile after another) or as rows; queries are packed as rows. Each task of a pass writes to its
// own memory and is cut by the shape alone, so results do not depend on the number of threads. Several heads of queries
// may share a head of keys and values; a single task then sums the gradients of that head.
#pragma once

#include <vector>

#include "variants.h"

namespace fastgan {

constexpr int64_t kTile = 64;        // keys per tile: the sums of their gradients stay in the first-level cache
constexpr int64_t kPadding = 16;     // packed rows are padded to a multiple of this many elements, at least a vector
constexpr int64_t kStrip = 8;        // query rows whose maps over all keys are in memory at once
constexpr int64_t kRowBlock = 32;    // query rows per step over a tile in the gradient
constexpr int64_t kStrip2 = 16;      // kStrip of the second gradient, which has twice as many maps
constexpr double kLog2E = 1.4426950408889634074;
constexpr int64_t kRowSums = 5;       // values per query that the second gradient keeps
constexpr int64_t kTasks = 32;       // key tiles of a slice are grouped to make about this many tasks

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t padded(int64_t x) { return ceil_div(x, kPadding) * kPadding; }
constexpr int64_t quads(int64_t x) { return ceil_div(x, 4) * 4; }

// A tensor (batch, heads, rows, channels); strides in elements.
struct View {
  void* data;
  int64_t batch, head, row, channel;
};

// Queries (batches, heads, n, d), keys (batches, key_heads, m, d), values (batches, key_heads, m, e).
struct AttentionShape {
  int64_t batches, heads, key_heads, n, m, d, e;
  double scale;    // above zero
  bool is_causal;  // query i sees only keys 0 to i

  int64_t slices() const { return batches * heads; }
  int64_t key_slices() const { return batches * key_heads; }
  int64_t sharing() const { return heads / key_heads; }  // heads of queries per head of keys
  int64_t tiles() const { return ceil_div(m, kTile); }
  int64_t padded_n() const { return ceil_div(n, kRowBlock) * kRowBlock; }
  int64_t strips() const { return ceil_div(n, kStrip); }
  int64_t groups() const {  // of tiles
    const int64_t wanted = key_slices() ? ceil_div(kTasks, key_slices()) : 1;
    return ceil_div(tiles(), ceil_div(tiles(), wanted < tiles() ? wanted : tiles()));
  }

  // The number of keys that rows [first, first + rows) see at most; the first row that may see a key.
  int64_t seen(int64_t first, int64_t rows) const { return is_causal && first + rows < m ? first + rows : m; }
  int64_t first_row(int64_t key) const { return is_causal ? key : 0; }
  // The i-th of `count` strips or tiles. If causal, their work is unequal: taking them from both ends by turns makes
  // every range of i the same work.
  int64_t nth(int64_t i, int64_t count) const { return !is_causal ? i : i % 2 ? count - 1 - i / 2 : i / 2; }
};

// The mask and the sinks, which also change the weights.
struct Masking {
  View mask;          // (batches, heads, n, m); no data if there is none
  bool is_boolean;    // bytes, 0 if the query may not see the key; otherwise the mask is added to the scaled logits
  Element element;    // type of an additive mask
  const void* sinks;  // (heads), float or double: one more logit per head, without a value; may be null

  bool is_added() const { return mask.data && !is_boolean; }
  bool is_scaled() const { return sinks || is_added(); }  // whether logits are scaled before the softmax
};

// A packed operand of all slices, in float or double.
struct Packed {
  void* data;
  int64_t slice;  // elements per slice
};

struct Size {
  Packed* operand;
  int64_t slices, elements;  // of each slice
};
using Sizes = std::vector<Size>;

struct AttentionForward {
  AttentionShape shape;
  Masking masking;
  View q, k, v, o;
  // (slices, n, 2): the largest logit, scaled if Masking::is_scaled, and 1 / the sum of exponentials relative to it.
  // Both are 0 for a row that sees no key, so its weights and gradients are 0.
  void* stats;
  Packed kt, v_rows;

  Sizes sizes() {
    const int64_t keys = shape.tiles() * kTile, key_slices = shape.key_slices();
    return {{&kt, key_slices, keys * shape.d}, {&v_rows, key_slices, keys * padded(shape.e)}};
  }
};

struct AttentionBackward {
  AttentionShape shape;
  Masking masking;
  View grad_o, q, k, v, o;
  const void* stats;
  View dq, dk, dv;
  void* d_sinks;              // (heads), in float or double
  Packed kt, vt, k_rows;      // keys
  Packed q_rows, go_rows;     // queries; grad_o is divided by the sum of exponentials
  Packed tops, deltas;        // per query: stats[0], and rowsum(go_rows * o)
  Packed sink_terms;          // per query: its contribution to d_sinks
  Packed dq_groups;           // one per group of tiles

  Sizes sizes() {
    const int64_t keys = shape.tiles() * kTile, rows = shape.padded_n(), d = shape.d, e = shape.e;
    const int64_t slices = shape.slices(), key_slices = shape.key_slices();
    return {{&kt, key_slices, keys * d},
            {&vt, key_slices, keys * e},
            {&k_rows, key_slices, keys * padded(d)},
            {&q_rows, slices, rows * quads(d)},
            {&go_rows, slices, rows * quads(e)},
            {&tops, slices, rows},
            {&deltas, slices, rows},
            {&sink_terms, masking.sinks ? slices : 0, rows},
            {&dq_groups, slices, shape.groups() * rows * padded(d)}};
  }
};

struct AttentionBackward2 {
  AttentionShape shape;
  Masking masking;
  View ggq, ggk, ggv, grad_o, q, k, v;  // ggk and ggv may be null, which is zero
  const void *stats, *gg_sinks;  // gg_sinks and g_sinks as sinks
  View g_do, gq, gk, gv;
  void* g_sinks;
  Packed kt, vt, ggkt, ggvt, k_rows, v_rows, ggk_rows, ggv_rows;
  Packed q_rows, ggq_rows, go_rows;
  Packed sums;        // kRowSums per query
  Packed sink_terms;  // per query: its contribution to g_sinks

  Sizes sizes() {
    const int64_t keys = shape.tiles() * kTile, rows = shape.padded_n(), d = shape.d, e = shape.e;
    const int64_t slices = shape.slices(), key_slices = shape.key_slices();
    const int64_t ggk_slices = ggk.data ? key_slices : 0, ggv_slices = ggv.data ? key_slices : 0;
    return {{&kt, key_slices, keys * d},
            {&vt, key_slices, keys * e},
            {&ggkt, ggk_slices, keys * d},
            {&ggvt, ggv_slices, keys * e},
            {&k_rows, key_slices, keys * padded(d)},
            {&v_rows, key_slices, keys * padded(e)},
            {&ggk_rows, ggk_slices, keys * padded(d)},
            {&ggv_rows, ggv_slices, keys * padded(e)},
            {&q_rows, slices, rows * quads(d)},
            {&ggq_rows, slices, rows * quads(d)},
            {&go_rows, slices, rows * quads(e)},
            {&sums, slices, rows * kRowSums},
            {&sink_terms, masking.sinks ? slices : 0, rows}};
  }
};

// Each takes a range of tasks; those with `room` also take scratch memory of the calling thread, in elements.
struct AttentionKernels {
  void (*forward_pack)(const AttentionForward&, int64_t begin, int64_t end);               // key slices x tiles
  void (*forward)(const AttentionForward&, int64_t begin, int64_t end, void* room);        // slices x strips
  void (*backward_pack_keys)(const AttentionBackward&, int64_t begin, int64_t end);        // key slices x tiles
  void (*backward_pack_rows)(const AttentionBackward&, int64_t begin, int64_t end);        // slices x strips
  void (*backward)(const AttentionBackward&, int64_t begin, int64_t end, void* room);      // key slices x groups
  void (*backward_sum)(const AttentionBackward&, int64_t begin, int64_t end);              // slices x strips
  void (*backward_sinks)(const AttentionBackward&, int64_t begin, int64_t end);            // heads
  void (*backward2_pack_keys)(const AttentionBackward2&, int64_t begin, int64_t end);             // key slices x tiles
  void (*backward2_rows)(const AttentionBackward2&, int64_t begin, int64_t end, void* room);      // slices x strips
  void (*backward2_keys)(const AttentionBackward2&, int64_t begin, int64_t end, void* room);      // key slices x tiles
  void (*backward2_sinks)(const AttentionBackward2&, int64_t begin, int64_t end);                 // heads
};

// Elements between the rows of a strip's maps. A power of two would map their lines to the same few cache sets.
inline int64_t map_stride(const AttentionShape& s) { return s.tiles() * kTile + kPadding; }

inline int64_t forward_room(const AttentionShape& s) { return kStrip * (quads(s.d) + map_stride(s) + padded(s.e)); }
inline int64_t backward_room(const AttentionShape& s) { return (2 * kRowBlock + padded(s.d) + padded(s.e)) * kTile; }
inline int64_t backward2_rows_room(const AttentionShape& s) {
  return kStrip * (4 * map_stride(s) + padded(s.d) + padded(s.e));
}
inline int64_t backward2_keys_room(const AttentionShape& s) { return (4 * kStrip2 + padded(s.d) + padded(s.e)) * kTile; }

const AttentionKernels& attention_kernels(Element element);

}  // namespace fastgan
