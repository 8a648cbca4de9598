#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine/layers/block_context.h"
#include "engine/ops/linear.h"
#include "engine/ops/rope.h"

namespace ht::engine {

// transformers' LlamaAttention, MistralAttention, Qwen2Attention (biases) and Qwen3Attention (per-head q and k norms),
// with q, k and v fused into one projection.
struct SelfAttention {
  int layer = 0;
  HeadShape shape;
  BaseLinear qkv;             // ((heads + 2 kv_heads) · head_dim, hidden): q, k, v
  BaseLinear o;               // (hidden, heads · head_dim)
  at::Tensor q_norm, k_norm;  // (head_dim); undefined: none
  double norm_eps = 0;
  std::int64_t window = 0;  // 0: full attention

  struct Saved {
    at::Tensor qkv;  // the projection (rotated in place when there is no norm)
    Heads heads;
    at::Tensor attended;                // (T, heads · head_dim)
    std::vector<at::Tensor> attention;  // what the device's attention keeps
    std::vector<at::Tensor> u_qkv, u_o;
  };

  // residual + attention(x); x and residual (T, hidden). `saved` nullptr: inference.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual, const BlockContext& context, Saved* saved) const;
  // dx given dy (T, hidden), the gradient of the attention's output (the residual path is the caller's). Consumes
  // `saved`. Undefined when need_dx is false.
  at::Tensor backward(const at::Tensor& dy, const at::Tensor& x, const BlockContext& context, Saved& saved,
                      bool need_dx) const;
};

}  // namespace ht::engine
