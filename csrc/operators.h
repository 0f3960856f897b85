// Operators that others are made of. Outputs are given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastgan {

void attention_fwd(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                   std::optional<torch::stable::Tensor> mask, std::optional<torch::stable::Tensor> sinks,
                   bool is_causal, double scale, torch::stable::Tensor o, torch::stable::Tensor stats);

}  // namespace fastgan
