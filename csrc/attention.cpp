// Operators on CPU tensors for attention and its gradients, by the passes of attention.h. Callers allocate the outputs.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "operators.h"
#include "workspace.h"

namespace fastgan {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// (B, N, d) or (B, H, N, d).
View view_of(const Tensor& x) {
  const int64_t last = x.dim() - 1, head = x.dim() == 4 ? x.stride(1) : 0;
  return {x.data_ptr(), x.stride(0), head, x.stride(last - 1), x.stride(last)};
}

int64_t heads_of(const Tensor& x) { return x.dim() == 4 ? x.size(1) : 1; }

AttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool is_causal) {
  const int64_t last = q.dim() - 1;
  return {q.size(0),        heads_of(q),  heads_of(k),  q.size(last - 1), k.size(last - 1),
          q.size(last), v.size(last), scale,        is_causal};
}

void* data_of(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }

// `sinks` (heads,), contiguous, in float or double.
Masking masking_of(const MaybeTensor& mask, const MaybeTensor& sinks) {
  Masking masking{};
  masking.sinks = data_of(sinks);
  if (mask) {
    masking.mask = view_of(*mask);
    masking.is_boolean = mask->scalar_type() == torch::headeronly::ScalarType::Bool;
    if (!masking.is_boolean) masking.element = element_of(*mask);
  }
  return masking;
}

}  // namespace

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, MaybeTensor mask, MaybeTensor sinks,
                   bool is_causal, double scale, Tensor o, Tensor stats) {
  const AttentionShape s = shape_of(q, k, v, scale, is_causal);
  const AttentionKernels& kernels = attention_kernels(element_of(q));
  Workspace workspace(q);
  AttentionForward x{s, masking_of(mask, sinks), view_of(q), view_of(k), view_of(v), view_of(o), stats.data_ptr(), {}, {}};
  workspace.take(x.sizes());
  in_parallel(s.key_slices() * s.tiles(), kernels.forward_pack, x);
  in_parallel(s.slices() * s.strips(), kernels.forward, x, workspace.bytes(forward_room(s)));
}

namespace {

void attention_bwd(const Tensor& grad_o, const Tensor& q, const Tensor& k, const Tensor& v, MaybeTensor mask,
                   MaybeTensor sinks, const Tensor& o, const Tensor& stats, bool is_causal, double scale, Tensor dq,
                   Tensor dk, Tensor dv, MaybeTensor d_sinks) {
  const AttentionShape s = shape_of(q, k, v, scale, is_causal);
  const AttentionKernels& kernels = attention_kernels(element_of(q));
  Workspace workspace(q);
  AttentionBackward x{};
  x.shape = s, x.masking = masking_of(mask, sinks);
  x.grad_o = view_of(grad_o), x.q = view_of(q), x.k = view_of(k), x.v = view_of(v), x.o = view_of(o);
  x.stats = stats.data_ptr();
  x.dq = view_of(dq), x.dk = view_of(dk), x.dv = view_of(dv), x.d_sinks = data_of(d_sinks);
  workspace.take(x.sizes());
  in_parallel(s.key_slices() * s.tiles(), kernels.backward_pack_keys, x);
  in_parallel(s.slices() * s.strips(), kernels.backward_pack_rows, x);
  in_parallel(s.key_slices() * s.groups(), kernels.backward, x, workspace.bytes(backward_room(s)));
  in_parallel(s.slices() * s.strips(), kernels.backward_sum, x);
  if (sinks) in_parallel(s.heads, kernels.backward_sinks, x);
}

void attention_bwd_bwd(const Tensor& ggq, MaybeTensor ggk, MaybeTensor ggv, MaybeTensor gg_sinks,
                       const Tensor& grad_o, const Tensor& q, const Tensor& k, const Tensor& v, MaybeTensor mask,
                       MaybeTensor sinks, const Tensor& stats, bool is_causal, double scale, Tensor g_do, Tensor gq,
                       Tensor gk, Tensor gv, MaybeTensor g_sinks) {
  const AttentionShape s = shape_of(q, k, v, scale, is_causal);
  const AttentionKernels& kernels = attention_kernels(element_of(q));
  Workspace workspace(q);
  AttentionBackward2 x{};
  x.shape = s, x.masking = masking_of(mask, sinks);
  x.ggq = view_of(ggq), x.grad_o = view_of(grad_o);
  if (ggk) x.ggk = view_of(*ggk);
  if (ggv) x.ggv = view_of(*ggv);
  x.q = view_of(q), x.k = view_of(k), x.v = view_of(v);
  x.stats = stats.data_ptr(), x.gg_sinks = data_of(gg_sinks);
  x.g_do = view_of(g_do), x.gq = view_of(gq), x.gk = view_of(gk), x.gv = view_of(gv), x.g_sinks = data_of(g_sinks);
  workspace.take(x.sizes());
  in_parallel(s.key_slices() * s.tiles(), kernels.backward2_pack_keys, x);
  in_parallel(s.slices() * s.strips(), kernels.backward2_rows, x, workspace.bytes(backward2_rows_room(s)));
  in_parallel(s.key_slices() * s.tiles(), kernels.backward2_keys, x, workspace.bytes(backward2_keys_room(s)));
  if (sinks) in_parallel(s.heads, kernels.backward2_sinks, x);
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastgan::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fastgan::attention_bwd));
  m.impl("attention_bwd_bwd", TORCH_BOX(&fastgan::attention_bwd_bwd));
}
