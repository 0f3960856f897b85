// Operators on CPU tensors for the projections around attention, by the passes of projections.h.
#include "projections.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>

#include "operators.h"
#include "workspace.h"

namespace fastgan {
namespace {

using torch::stable::Tensor;

Image image_of(const Tensor& x) {
  return {x.data_ptr(), element_of(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

View rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), 0, x.stride(1), x.stride(2)}; }
View weight_of(const Tensor& x) { return {x.data_ptr(), 0, 0, x.stride(0), x.stride(1)}; }
View bias_of(const std::optional<Tensor>& x) {
  return x ? View{x->data_ptr(), 0, 0, x->stride(0), 0} : View{nullptr, 0, 0, 0, 0};
}

}  // namespace

void pooled_projection(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, Tensor q, Tensor kv,
                       Tensor index) {
  PooledProjection p{};
  p.batches = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
  p.outputs = weight.size(0), p.d = q.size(2);
  p.x = image_of(x), p.weight = weight_of(weight), p.bias = bias_of(bias);
  p.q = rows_of(q), p.kv = rows_of(kv), p.index = static_cast<int8_t*>(index.data_ptr());
  const ProjectionKernels& kernels = projection_kernels(element_of(weight));
  Workspace workspace(weight);
  workspace.take(p.sizes());
  in_parallel(p.channels, kernels.pooled_pack, p);
  in_parallel(p.batches * p.tiles(), kernels.pooled, p, workspace.bytes(p.room()));
}

void projection_residual(const Tensor& rows, const Tensor& weight, std::optional<Tensor> bias, const Tensor& x,
                         Tensor y) {
  ProjectionResidual p{};
  p.batches = rows.size(0), p.pixels = rows.size(1), p.channels = weight.size(0), p.e = rows.size(2);
  p.rows = rows_of(rows), p.weight = weight_of(weight), p.bias = bias_of(bias);
  p.x = image_of(x), p.y = image_of(y);
  const ProjectionKernels& kernels = projection_kernels(element_of(weight));
  Workspace workspace(weight);
  workspace.take(p.sizes());
  in_parallel(p.channels, kernels.residual_pack, p);
  in_parallel(p.batches * p.tiles(), kernels.residual, p, workspace.bytes(p.room()));
}

// The output of a block without gradients: queries and pooled keys and values of `h`, attention, and `x` plus its
// projection. Weights are (2 d + e, channels) and (channels, e).
Tensor attention_block(const Tensor& h, const Tensor& weight, std::optional<Tensor> bias, int64_t d,
                       const Tensor& out_weight, std::optional<Tensor> out_bias, const Tensor& x, double scale) {
  using torch::headeronly::MemoryFormat;
  using torch::headeronly::ScalarType;
  const int64_t batches = h.size(0), pixels = h.size(2) * h.size(3), keys = (h.size(2) / 2) * (h.size(3) / 2);
  const int64_t e = out_weight.size(1);
  const Tensor q = torch::stable::new_empty(weight, {batches, pixels, d});
  const Tensor kv = torch::stable::new_empty(weight, {batches, keys, d + e});
  pooled_projection(h, weight, bias, q, kv, torch::stable::new_empty(weight, {batches, keys, d + e}, ScalarType::Char));
  const Tensor o = torch::stable::new_empty(weight, {batches, pixels, e});
  const bool is_double = weight.scalar_type() == ScalarType::Double;
  const Tensor stats =
      torch::stable::new_empty(weight, {batches, pixels, 2}, is_double ? ScalarType::Double : ScalarType::Float);
  Tensor k = kv, v = kv;
  k = torch::stable::narrow(k, 2, 0, d), v = torch::stable::narrow(v, 2, d, e);
  attention_fwd(q, k, v, std::nullopt, std::nullopt, false, scale, o, stats);
  const bool channels_last = x.stride(1) == 1 && x.size(1) > 1;
  Tensor y = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Tensor alike = x;  // in y's layout
  bool is_alike = true;
  for (int64_t i = 0; i < 4; ++i) is_alike = is_alike && x.stride(i) == y.stride(i);
  if (!is_alike) {
    alike = torch::stable::empty_like(y);
    torch::stable::copy_(alike, x);
  }
  projection_residual(o, out_weight, out_bias, alike, y);
  return y;
}

namespace {

void projection_gradients(const Tensor& dy, const Tensor& x, const Tensor& weight, Tensor dx, Tensor dweight) {
  ProjectionGradients p{};
  p.batches = dy.size(0), p.pixels = dy.size(1), p.outputs = dy.size(2), p.channels = x.size(2);
  p.dy = rows_of(dy), p.x = rows_of(x), p.dx = rows_of(dx);
  p.weight = weight_of(weight), p.dweight = weight_of(dweight);
  const ProjectionKernels& kernels = projection_kernels(element_of(weight));
  Workspace workspace(weight);
  workspace.take(p.sizes());
  in_parallel(p.outputs, kernels.gradients_pack, p);
  in_parallel(p.chunks(), kernels.gradients, p, workspace.bytes(p.room()));
  in_parallel(p.sum_rows(), kernels.gradients_sum, p);
}

// Each pixel's gradient with respect to all outputs: that of q, and that of kv if this pixel was the largest of its
// window. Copies numbers as `Bits`.
template <typename Bits>
void unpool_rows(const View& grad_q, const View& grad_kv, const int8_t* index, Bits* out, int64_t height, int64_t width,
                 int64_t d, int64_t channels, int64_t begin, int64_t end) {
  const int64_t pooled_height = height / 2, pooled_width = width / 2;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t batch = line / height, h = line % height;
    const Bits* q = static_cast<const Bits*>(grad_q.data) + batch * grad_q.batch + h * width * grad_q.row;
    const Bits* kv = static_cast<const Bits*>(grad_kv.data) + batch * grad_kv.batch;
    for (int64_t w = 0; w < width; ++w, q += grad_q.row) {
      for (int64_t i = 0; i < d; ++i) out[(line * width + w) * (d + channels) + i] = q[i * grad_q.channel];
      Bits* to = out + (line * width + w) * (d + channels) + d;
      if (h / 2 == pooled_height || w / 2 == pooled_width) {
        for (int64_t c = 0; c < channels; ++c) to[c] = 0;
        continue;
      }
      const int64_t pixel = h / 2 * pooled_width + w / 2;
      const int8_t* largest = index + (batch * pooled_height * pooled_width + pixel) * channels;
      const Bits* from = kv + pixel * grad_kv.row;
      const auto corner = int8_t(h % 2 * 2 + w % 2);
      for (int64_t c = 0; c < channels; ++c) to[c] = largest[c] == corner ? from[c * grad_kv.channel] : 0;
    }
  }
}

// The transpose of unpool_rows: q's channels of each pixel, and kv's channels of the largest pixel of each window.
template <typename Bits>
void gather_rows(const View& grad, const int8_t* index, const View& q, const View& kv, int64_t height, int64_t width,
                 int64_t d, int64_t channels, int64_t begin, int64_t end) {
  const int64_t pooled_height = height / 2, pooled_width = width / 2;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t batch = line / height, h = line % height;
    const Bits* from = static_cast<const Bits*>(grad.data) + batch * grad.batch + h * width * grad.row;
    Bits* to = static_cast<Bits*>(q.data) + batch * q.batch + h * width * q.row;
    for (int64_t w = 0; w < width; ++w)
      for (int64_t i = 0; i < d; ++i) to[w * q.row + i * q.channel] = from[w * grad.row + i * grad.channel];
    if (h % 2 || h / 2 == pooled_height) continue;
    for (int64_t w = 0; w < pooled_width; ++w) {
      const int64_t pixel = h / 2 * pooled_width + w;
      const int8_t* largest = index + (batch * pooled_height * pooled_width + pixel) * channels;
      const Bits* window = from + 2 * w * grad.row + d * grad.channel;
      to = static_cast<Bits*>(kv.data) + batch * kv.batch + pixel * kv.row;
      for (int64_t c = 0; c < channels; ++c)
        to[c * kv.channel] = window[(largest[c] / 2 * width + largest[c] % 2) * grad.row + c * grad.channel];
    }
  }
}

// Calls f with a null pointer to an integer type as wide as the tensor's elements.
template <typename F>
void for_bits_of(const Tensor& tensor, const F& f) {
  switch (element_of(tensor)) {
    case Element::kFloat: return f(static_cast<uint32_t*>(nullptr));
    case Element::kDouble: return f(static_cast<uint64_t*>(nullptr));
    default: return f(static_cast<uint16_t*>(nullptr));
  }
}

void gather_pooled(const Tensor& grad, const Tensor& index, int64_t width, Tensor q, Tensor kv) {
  const int64_t height = width ? grad.size(1) / width : 0, d = q.size(2), channels = kv.size(2);
  const auto* largest = static_cast<const int8_t*>(index.data_ptr());
  torch::stable::parallel_for(0, grad.size(0) * height, 1, [&](int64_t begin, int64_t end) {
    for_bits_of(grad, [&](auto* null) {
      using Bits = std::remove_pointer_t<decltype(null)>;
      gather_rows<Bits>(rows_of(grad), largest, rows_of(q), rows_of(kv), height, width, d, channels, begin, end);
    });
  });
}

void unpool(const Tensor& grad_q, const Tensor& grad_kv, const Tensor& index, int64_t width, Tensor out) {
  const int64_t height = width ? out.size(1) / width : 0, d = grad_q.size(2), channels = grad_kv.size(2);
  const auto* largest = static_cast<const int8_t*>(index.data_ptr());
  torch::stable::parallel_for(0, out.size(0) * height, 1, [&](int64_t begin, int64_t end) {
    for_bits_of(out, [&](auto* null) {
      auto* to = static_cast<decltype(null)>(out.data_ptr());
      unpool_rows(rows_of(grad_q), rows_of(grad_kv), largest, to, height, width, d, channels, begin, end);
    });
  });
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CPU, m) {
  m.impl("pooled_projection", TORCH_BOX(&fastgan::pooled_projection));
  m.impl("attention_block", TORCH_BOX(&fastgan::attention_block));
  m.impl("projection_gradients", TORCH_BOX(&fastgan::projection_gradients));
  m.impl("unpool", TORCH_BOX(&fastgan::unpool));
  m.impl("gather_pooled", TORCH_BOX(&fastgan::gather_pooled));
  m.impl("projection_residual", TORCH_BOX(&fastgan::projection_residual));
}
