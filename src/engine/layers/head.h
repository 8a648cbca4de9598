#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>

#include "engine/device/device.h"
#include "engine/ops/linear.h"
#include "engine/ops/token_logprobs.h"
#include "engine/ops/views.h"

namespace ht::engine {

// Given the logprobs of targets [target_begin, target_end), writes d(loss)/d(logprob) of each. Both pointers are
// indexed by target, from the batch's first.
using TokenLoss =
    std::function<void(std::int64_t target_begin, std::int64_t target_end, const float* logprobs, float* dlogprobs)>;

// The unembedding with its LoRA, fused with log-softmax and the loss over chunks of rows: the full logits never exist.
// `between_chunks` is called after each chunk; it may be empty.
struct Head {
  BaseLinear unembedding;  // (vocab, hidden)

  // hidden (R, hidden) -> logits (R, vocab) float32 into `out`. Segments are in rows of `hidden`.
  void logits_out(const at::Tensor& hidden, std::span<const LoraSegment> segments, at::Tensor& out) const;

  // Logprobs of all targets of `hidden`'s rows [row_begin, row_end), without gradients.
  void logprobs(const Device& device, const at::Tensor& hidden, std::span<const LoraSegment> segments,
                const RowTargets& targets, std::int64_t row_begin, std::int64_t row_end, float* logprobs,
                const std::function<void()>& between_chunks = {}) const;
  // Logprobs of all rows' targets, the loss's gradient through them into the unembedding's LoRA, and d(hidden) (T,
  // hidden).
  at::Tensor loss_backward(const Device& device, const at::Tensor& hidden, std::span<const LoraSegment> segments,
                           const RowTargets& targets, const TokenLoss& loss, float* logprobs,
                           const std::function<void()>& between_chunks = {}) const;
};

}  // namespace ht::engine
