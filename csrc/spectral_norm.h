// Spectral norms of many weights on a CPU: the data that the operators (spectral_norm.cpp) pass to the kernels
// (spectral_norm_kernels.h). Does not depend on torch.
//
// A weight in memory is `blocks` times `rows` lines of `length` elements. Its matrix has `rows` rows, each of which
// holds the columns of all blocks. Vectors and sums are float64 for float64 weights and float32 otherwise. Tasks are
// cut by the shapes alone and their sums are added in order, so results do not depend on the number of threads.
#pragma once

#include <vector>

#include "variants.h"

namespace fastgan {

constexpr int64_t kTaskElements = 16384;
constexpr int64_t kBuffer = 256;  // elements widened at a time

struct Tagged {
  const void* data;  // or null
  Element element;
};

struct Lines {
  int64_t blocks, rows, length;

  int64_t lines() const { return blocks * rows; }
  int64_t columns() const { return blocks * length; }
};

// W v or W^T u, over lines that are all rows of one block, or over all blocks.
struct Product {
  Lines shape;
  Tagged w;
  const void* vector;
  void* out;
};

// s = W v, and W^T s as a sum over parts of `every` rows each, whose sums are contiguous in `sums`.
struct Iteration {
  Lines shape;
  Tagged w;
  const void* v;
  void *s, *sums;
  int64_t every;
};

// <g, w>, <h, g> and <h, u v^T>; a null operand counts as zero.
struct Dots {
  Lines shape;
  Tagged w, g, h;
  const void *u, *v;
};

// out <- x / sigma + p y + q u v^T; a null operand counts as zero.
struct Combination {
  Lines shape;
  Tagged x, y, out;
  double sigma, p, q;
  const void *u, *v;
};

// Lines [first, first + count) of an operand: rows for W v and iterations, columns for W^T u.
struct Part {
  int64_t operand, first, count;
};

template <typename Operand>
struct Pass {
  std::vector<Operand> operands;
  std::vector<Part> parts;

  // Cuts `size` lines, rows or columns of the last operand into parts of at least `least`. Each of them has `elements`
  // elements of the weight.
  void cut(int64_t size, int64_t elements, int64_t least = 1) {
    const int64_t wanted = kTaskElements / (elements ? elements : 1);
    cut_evenly(size, wanted > least ? wanted : least);
  }

  // Cuts them into parts of `count`.
  void cut_evenly(int64_t size, int64_t count) {
    for (int64_t first = 0; first < size; first += count)
      parts.push_back({int64_t(operands.size()) - 1, first, size - first < count ? size - first : count});
  }
};

struct SpectralNormKernels {
  void (*rows)(const Product*, const Part*, int64_t begin, int64_t end);
  void (*columns)(const Product*, const Part*, int64_t begin, int64_t end);
  void (*iterate)(const Iteration*, const Part*, int64_t begin, int64_t end);
  void (*dots)(const Dots*, const Part*, int64_t begin, int64_t end, double* sums);  // three per part
  void (*combine)(const Combination*, const Part*, int64_t begin, int64_t end);
};

const SpectralNormKernels& spectral_norm_kernels(bool is_double);

}  // namespace fastgan
