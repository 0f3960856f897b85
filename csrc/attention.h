// Attention O = softmax(scale Q K^T) V and its first and second gradients on a CPU: what the operators (attention.cpp)
// hand to the kernels (attention_kernels.h). Free of torch.
//
// Each pass first packs its operands, in float or double: keys in tiles of kTile, transposed (channels x kTile, one tile
// behind the other) or as rows; queries as rows. The tasks of a pass write to places of their own and depend on the
// shape alone, so that results do not depend on the number of threads.
#pragma once

#include <utility>
#include <vector>

#include "variants.h"

namespace fastgan {

constexpr int64_t kTile = 64;        // keys of a tile: sums for their gradients stay in the first-level cache
constexpr int64_t kPadding = 16;     // rows of packed operands are multiples of so many elements, at least a vector
constexpr int64_t kStrip = 8;        // query rows whose maps of all keys are in memory at a time
constexpr int64_t kRowBlock = 32;    // query rows that pass a tile at a time in the gradient
constexpr int64_t kStrip2 = 16;      // the same in the gradient of the gradient, which has twice the maps
constexpr double kLog2E = 1.4426950408889634074;
constexpr int64_t kRowSums = 5;       // what the gradient of the gradient keeps of each query
constexpr int64_t kTasks = 32;       // key tiles of one slice form groups, so that there are about so many tasks

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t padded(int64_t x) { return ceil_div(x, kPadding) * kPadding; }
constexpr int64_t quads(int64_t x) { return ceil_div(x, 4) * 4; }

// A tensor (batch, heads, rows, channels); strides in elements.
struct View {
  void* data;
  int64_t batch, head, row, channel;
};

struct AttentionShape {
  int64_t batches, heads, n, m, d, e;  // queries (batches, heads, n, d), keys (.., m, d), values (.., m, e)
  double scale;                        // above zero

  int64_t slices() const { return batches * heads; }
  int64_t tiles() const { return ceil_div(m, kTile); }
  int64_t padded_n() const { return ceil_div(n, kRowBlock) * kRowBlock; }
  int64_t strips() const { return ceil_div(n, kStrip); }
  int64_t groups() const {  // of tiles
    const int64_t wanted = slices() ? ceil_div(kTasks, slices()) : 1;
    return ceil_div(tiles(), ceil_div(tiles(), wanted < tiles() ? wanted : tiles()));
  }
};

// A packed operand of all slices, in float or double.
struct Packed {
  void* data;
  int64_t slice;  // elements of one
};

using Sizes = std::vector<std::pair<Packed*, int64_t>>;  // operands and the elements that a slice of each needs

struct AttentionForward {
  AttentionShape shape;
  View q, k, v, o;
  void* stats;   // (slices, n, 2): the largest of q K^T, and 1 / the sum of exponentials relative to it
  Packed kt, v_rows;

  Sizes sizes() {
    const int64_t keys = shape.tiles() * kTile;
    return {{&kt, keys * shape.d}, {&v_rows, keys * padded(shape.e)}};
  }
};

struct AttentionBackward {
  AttentionShape shape;
  View grad_o, q, k, v, o;
  const void* stats;
  View dq, dk, dv;
  Packed kt, vt, k_rows;      // keys
  Packed q_rows, go_rows;     // queries; grad_o is divided by the sum of exponentials
  Packed tops, deltas;        // per query: stats[0], and rowsum(go_rows * o)
  Packed dq_groups;           // of each group of tiles

  Sizes sizes() {
    const int64_t keys = shape.tiles() * kTile, rows = shape.padded_n(), d = shape.d, e = shape.e;
    return {{&kt, keys * d},
            {&vt, keys * e},
            {&k_rows, keys * padded(d)},
            {&q_rows, rows * quads(d)},
            {&go_rows, rows * quads(e)},
            {&tops, rows},
            {&deltas, rows},
            {&dq_groups, shape.groups() * rows * padded(d)}};
  }
};

struct AttentionBackward2 {
  AttentionShape shape;
  View ggq, ggk, ggv, grad_o, q, k, v;
  const void* stats;
  View g_do, gq, gk, gv;
  Packed kt, vt, ggkt, ggvt, k_rows, v_rows, ggk_rows, ggv_rows;
  Packed q_rows, ggq_rows, go_rows;
  Packed sums;  // kRowSums of each query

  Sizes sizes() {
    const int64_t keys = shape.tiles() * kTile, rows = shape.padded_n(), d = shape.d, e = shape.e;
    return {{&kt, keys * d},
            {&vt, keys * e},
            {&ggkt, keys * d},
            {&ggvt, keys * e},
            {&k_rows, keys * padded(d)},
            {&v_rows, keys * padded(e)},
            {&ggk_rows, keys * padded(d)},
            {&ggv_rows, keys * padded(e)},
            {&q_rows, rows * quads(d)},
            {&ggq_rows, rows * quads(d)},
            {&go_rows, rows * quads(e)},
            {&sums, rows * kRowSums}};
  }
};

// Each takes a range of tasks and, where it says so, room of its thread's own, in elements.
struct AttentionKernels {
  void (*forward_pack)(const AttentionForward&, int64_t begin, int64_t end);               // slices x tiles
  void (*forward)(const AttentionForward&, int64_t begin, int64_t end, void* room);        // slices x strips
  void (*backward_pack_keys)(const AttentionBackward&, int64_t begin, int64_t end);        // slices x tiles
  void (*backward_pack_rows)(const AttentionBackward&, int64_t begin, int64_t end);        // slices x strips
  void (*backward)(const AttentionBackward&, int64_t begin, int64_t end, void* room);      // slices x groups
  void (*backward_sum)(const AttentionBackward&, int64_t begin, int64_t end);              // slices x strips
  void (*backward2_pack_keys)(const AttentionBackward2&, int64_t begin, int64_t end);             // slices x tiles
  void (*backward2_rows)(const AttentionBackward2&, int64_t begin, int64_t end, void* room);      // slices x strips
  void (*backward2_keys)(const AttentionBackward2&, int64_t begin, int64_t end, void* room);      // slices x tiles
};

// Elements between the rows of a strip's maps: not a power of two, whose lines would meet in the same few places of a cache.
inline int64_t map_stride(const AttentionShape& s) { return s.tiles() * kTile + kPadding; }

inline int64_t forward_room(const AttentionShape& s) { return kStrip * (quads(s.d) + map_stride(s) + padded(s.e)); }
inline int64_t backward_room(const AttentionShape& s) { return (2 * kRowBlock + padded(s.d) + padded(s.e)) * kTile; }
inline int64_t backward2_rows_room(const AttentionShape& s) {
  return kStrip * (4 * map_stride(s) + padded(s.d) + padded(s.e));
}
inline int64_t backward2_keys_room(const AttentionShape& s) { return (4 * kStrip2 + padded(s.d) + padded(s.e)) * kTile; }

const AttentionKernels& attention_kernels(Element element);

}  // namespace fastgan
