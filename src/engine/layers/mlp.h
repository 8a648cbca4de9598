#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine/layers/block_context.h"
#include "engine/ops/linear.h"

namespace ht::engine {

// transformers' LlamaMLP (and Mistral's, Qwen2's, Qwen3's): down(silu(gate(x)) · up(x)), gate and up fused.
struct Mlp {
  int layer = 0;
  BaseLinear gate_up;  // (2 intermediate, hidden): gate, up
  BaseLinear down;     // (hidden, intermediate)

  struct Saved {
    at::Tensor gate_up;  // (T, 2 intermediate)
    at::Tensor act;      // (T, intermediate)
    std::vector<at::Tensor> u_gate_up, u_down;
  };

  // residual + mlp(x). `saved` nullptr: inference.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual, const BlockContext& context, Saved* saved) const;
  // Fills `saved` again from x, without the down projection.
  void recompute(const at::Tensor& x, const BlockContext& context, Saved& saved) const;
  // dx given dy (T, hidden). Consumes `saved`.
  at::Tensor backward(const at::Tensor& dy, const at::Tensor& x, const BlockContext& context, Saved& saved) const;
};

}  // namespace ht::engine
