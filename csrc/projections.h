// The projections around attention on a CPU: the data that the operators (projections.cpp) pass to the kernels
// (projections_kernels.h). Does not depend on torch.
#pragma once

#include "attention.h"

namespace fastgan {

constexpr int64_t kTileColumns = 16;  // pixels per tile of pooled_projection, in each of two image rows
constexpr int64_t kChunks = 16;       // groups of tiles, each with its own sum of the weight's gradient

// A feature map (batch, channels, height, width) of elements of its own type; strides in elements.
struct Image {
  void* data;
  Element element;
  int64_t batch, channel, row, column;
};

// q <- the first d outputs, kv <- the others, max-pooled over windows of 2 x 2, index <- which pixel of each was
// largest.
struct PooledProjection {
  int64_t batches, channels, height, width, outputs, d;
  Image x;
  View weight, bias;        // (outputs, channels); (outputs), only `row` is used, or no data
  View q, kv;               // kv (batches, 1, pooled pixels, outputs - d)
  int8_t* index;            // kv's shape, contiguous
  Packed weight_t, biases;  // (channels, padded(outputs)), (padded(outputs))

  int64_t tiles() const { return ceil_div(height, 2) * ceil_div(width, kTileColumns); }
  int64_t room() const { return 2 * kTileColumns * (channels + padded(outputs)) + kPadding; }
  Sizes sizes() { return {{&weight_t, 1, channels * padded(outputs)}, {&biases, 1, padded(outputs)}}; }
};

// y <- x + rows weight^T + bias. Consecutive pixels of x and y are `column` elements apart.
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

// Gradients of y = x weight^T, whose rows are pixels: dx <- dy weight, dweight <- dy^T x.
struct ProjectionGradients {
  int64_t batches, pixels, outputs, channels;
  View dy, x, dx;        // (batches, 1, pixels, outputs), (batches, 1, pixels, channels) twice
  View weight, dweight;  // (outputs, channels)
  Packed packed;         // the weight
  Packed sums;           // dweight of each chunk of tiles, transposed if x is

  // Whether the pixels of a channel are contiguous.
  bool dy_transposed() const { return dy.row == 1 && dy.channel != 1; }
  bool x_transposed() const { return x.row == 1 && x.channel != 1 && !dy_transposed(); }
  int64_t tiles() const { return batches * ceil_div(pixels, kTile); }
  int64_t chunks() const { return tiles() < kChunks ? tiles() : kChunks; }
  // Elements between rows; not a power of two, like map_stride.
  int64_t stride_of_outputs() const { return padded(outputs) + kPadding; }
  int64_t stride_of_channels() const { return padded(channels) + kPadding; }
  int64_t sum_rows() const { return x_transposed() ? channels : outputs; }
  int64_t sum_stride() const { return x_transposed() ? stride_of_outputs() : stride_of_channels(); }
  int64_t room() const { return 2 * kTile * (stride_of_outputs() + stride_of_channels()); }
  Sizes sizes() {
    return {{&packed, 1, outputs * stride_of_channels()}, {&sums, chunks(), quads(sum_rows()) * sum_stride()}};
  }
};

struct ProjectionKernels {
  void (*pooled_pack)(const PooledProjection&, int64_t begin, int64_t end);           // channels
  void (*pooled)(const PooledProjection&, int64_t begin, int64_t end, void* room);    // batches x tiles
  void (*residual_pack)(const ProjectionResidual&, int64_t begin, int64_t end);       // channels
  void (*residual)(const ProjectionResidual&, int64_t begin, int64_t end, void* room);  // batches x tiles
  void (*gradients_pack)(const ProjectionGradients&, int64_t begin, int64_t end);       // outputs
  void (*gradients)(const ProjectionGradients&, int64_t begin, int64_t end, void* room);  // chunks
  void (*gradients_sum)(const ProjectionGradients&, int64_t begin, int64_t end);        // sum_rows
};

const ProjectionKernels& projection_kernels(Element element);

}  // namespace fastgan
