#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

namespace ht::engine {

// Causal attention over packed sequences; query heads share key/value heads in groups (GQA).
//   q (T, heads, d), k and v (T, kv_heads, d): float32, last dimension contiguous, rows may be strided.
//   cu_seqlens [num_sequences + 1]; `window` > 0: position i sees the positions j with i - window < j <= i
//   (transformers' sliding_window); the scores are scaled by 1 / sqrt(d).
// Returns o (T, heads · d), contiguous. `lse` receives one log-sum-exp tensor per internal tile, for the backward.
at::Tensor attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             std::span<const std::int32_t> cu_seqlens, std::int64_t window,
                             std::vector<at::Tensor>& lse);

// Writes the gradients of q, k and v into dqkv (T, (heads + 2 kv_heads) · d), side by side, given do (T, heads · d).
void attention_backward(const at::Tensor& grad_o, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& o, std::span<const std::int32_t> cu_seqlens, std::int64_t window,
                        const std::vector<at::Tensor>& lse, at::Tensor& dqkv);

}  // namespace ht::engine
