#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "engine/device/device.h"
#include "engine/ops/views.h"
#include "model_spec/model_spec.h"

namespace ht::engine {

// cos and sin of position · inverse frequency for every row, (T, head_dim / 2) float32, times the attention scaling.
struct RopeTable {
  at::Tensor cos;
  at::Tensor sin;
};

// The inverse frequencies of a sequence of `seq_len` tokens and the factor on cos and sin. Mirrors transformers'
// modeling_rope_utils.py (default, linear, dynamic, yarn, llama3, longrope) in float32.
struct RopeFrequencies {
  std::vector<float> inverse;  // [head_dim / 2]
  float scaling = 1.0f;
};
RopeFrequencies rope_frequencies(const model_spec::ModelSpec& spec, std::int64_t seq_len);

// In host memory. `dynamic` and `longrope` depend on a sequence's length, which is taken as its last position + 1.
RopeTable rope_table(const model_spec::ModelSpec& spec, const PackedSequences& batch);

struct HeadShape {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
};

// Post-rope heads: q (T, heads, head_dim), k and v (T, kv_heads, head_dim). With a norm q and k are new tensors,
// without one they and v are views of the fused projection.
struct Heads {
  at::Tensor q, k, v;
  at::Tensor rstd_q, rstd_k;  // float32 (T, heads), (T, kv_heads); undefined without a norm
};

// Cuts qkv (T, (heads + 2 kv_heads) · head_dim), contiguous, into heads, normalises q and k per head where q_norm and
// k_norm (head_dim) are defined (Qwen3Attention), and rotates them. Without a norm qkv is rotated in place.
Heads norm_rope_forward(const Device& device, at::Tensor& qkv, const HeadShape& shape, const RopeTable& rope,
                        const at::Tensor& q_norm, const at::Tensor& k_norm, double eps);
// In: dqkv holds the gradients of the post-rope heads; out: those of qkv. `qkv` is the forward's input (only read with
// a norm).
void norm_rope_backward(const Device& device, at::Tensor& dqkv, const at::Tensor& qkv, const Heads& heads,
                        const HeadShape& shape, const RopeTable& rope, const at::Tensor& q_norm,
                        const at::Tensor& k_norm);

// What norm_rope_forward makes of qkv, heads side by side (T, (heads + 2 kv_heads) · head_dim), in qkv's dtype.
at::Tensor norm_rope_reference(const at::Tensor& qkv, const HeadShape& shape, const RopeTable& rope,
                               const at::Tensor& q_norm, const at::Tensor& k_norm, double eps);

}  // namespace ht::engine
