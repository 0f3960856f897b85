// Spectral norms of many weights on a CPU: what the operators (spectral_norm.cpp) hand to the kernels
// (spectral_norm_kernels.h). Free of torch.
//
// A weight in memory is `blocks` times `rows` lines of `length` elements: its matrix has `rows` rows, and in each of them
// the columns of all blocks. Vectors and sums are float64 for float64 weights and else float32. Tasks are cut by the
// shapes alone, and sums over them are added in their order, so that results do not depend on the number of threads.
#pragma once

#include <vector>

#include "variants.h"

namespace fastgan {

constexpr int64_t kTaskElements = 16384;
constexpr int64_t kBuffer = 256;  // elements that are widened at a time

struct Tagged {
  const void* data;  // or null
  Element element;
};

struct Lines {
  int64_t blocks, rows, length;

  int64_t lines() const { return blocks * rows; }
  int64_t columns() const { return blocks * length; }
};

// W v, or W^T u, of lines that are all rows of one block, or all blocks.
struct Product {
  Lines shape;
  Tagged w;
  const void* vector;
  void* out;
};

// s = W v, and W^T s as a sum over the parts: `every` rows each, whose sums lie one behind the other in `sums`.
struct Iteration {
  Lines shape;
  Tagged w;
  const void* v;
  void *s, *sums;
  int64_t every;
};

// <g, w>, <h, g> and <h, u v^T>; what is null counts as zero.
struct Dots {
  Lines shape;
  Tagged w, g, h;
  const void *u, *v;
};

// out <- x / sigma + p y + q u v^T; what is null counts as zero.
struct Combination {
  Lines shape;
  Tagged x, y, out;
  double sigma, p, q;
  const void *u, *v;
};

// Lines [first, first + count) of an operand; of W v and of iterations, rows, and of W^T u, columns.
struct Part {
  int64_t operand, first, count;
};

template <typename Operand>
struct Pass {
  std::vector<Operand> operands;
  std::vector<Part> parts;

  // Cuts `size` lines, rows or columns of the last operand, `elements` of the weight each, at least so many at a time.
  void cut(int64_t size, int64_t elements, int64_t least = 1) {
    const int64_t wanted = kTaskElements / (elements ? elements : 1);
    cut_evenly(size, wanted > least ? wanted : least);
  }

  // Cuts `count` lines, rows or columns at a time.
  void cut_evenly(int64_t size, int64_t count) {
    for (int64_t first = 0; first < size; first += count)
      parts.push_back({int64_t(operands.size()) - 1, first, size - first < count ? size - first : count});
  }
};

struct SpectralNormKernels {
  void (*rows)(const Product*, const Part*, int64_t begin, int64_t end);
  void (*columns)(const Product*, const Part*, int64_t begin, int64_t end);
  void (*iterate)(const Iteration*, const Part*, int64_t begin, int64_t end);
  void (*dots)(const Dots*, const Part*, int64_t begin, int64_t end, double* sums);  // three for each part
  void (*combine)(const Combination*, const Part*, int64_t begin, int64_t end);
};

const SpectralNormKernels& spectral_norm_kernels(bool is_double);

}  // namespace fastgan
