// The projections around attention on a CPU: what the operators (projections.cpp) hand to the kernels
// (projections_kernels.h). Free of torch.
#pragma once

#include "attention.h"

namespace fastgan {

constexpr int64_t kTileColumns = 16;  // pixels of a tile of pooled_projection, in each of two image rows

// A feature map (batch, channels, height, width) of elements of its own type; strides in elements.
struct Image {
  void* data;
  Element element;
  int64_t batch, channel, row, column;
};

// q <- the first d outputs, kv <- the others, max-pooled over windows of 2 x 2, index <- which pixel of each was largest.
struct PooledProjection {
  int64_t batches, channels, height, width, outputs, d;
  Image x;
  View weight, bias;        // (outputs, channels); (outputs), of which only `row` counts, or no data
  View q, kv;               // kv (batches, 1, pooled pixels, outputs - d)
  int8_t* index;            // kv's shape, contiguous
  Packed weight_t, biases;  // (channels, padded(outputs)), (padded(outputs))

  int64_t tiles() const { return ceil_div(height, 2) * ceil_div(width, kTileColumns); }
  int64_t room() const { return 2 * kTileColumns * (channels + padded(outputs)) + kPadding; }
  Sizes sizes() { return {{&weight_t, 1, channels * padded(outputs)}, {&biases, 1, padded(outputs)}}; }
};

// y <- x + rows weight^T + bias. Pixels of x and y follow one another at a stride of `column`.
struct ProjectionResidual {
  int64_t batches, pixels, channels, e;
  View rows, weight, bias;  // (batches, 1, pixels, e); (channels, e); (channels)
  Image x, y;
  Packed packed, biases;  // the weight as rows or, channels-last, transposed

  bool channels_last() const { return y.channel == 1; }
  int64_t tiles() const { return ceil_div(pixels, kTile); }
  int64_t room() const { return kTile * (padded(e) + padded(channels)); }
  Sizes sizes() { return {{&packed, 1, padded(e) * padded(channels)}, {&biases, 1, padded(channels)}}; }
};

struct ProjectionKernels {
  void (*pooled_pack)(const PooledProjection&, int64_t begin, int64_t end);           // channels
  void (*pooled)(const PooledProjection&, int64_t begin, int64_t end, void* room);    // batches x tiles
  void (*residual_pack)(const ProjectionResidual&, int64_t begin, int64_t end);       // channels
  void (*residual)(const ProjectionResidual&, int64_t begin, int64_t end, void* room);  // batches x tiles
};

const ProjectionKernels& projection_kernels(Element element);

}  // namespace fastgan
