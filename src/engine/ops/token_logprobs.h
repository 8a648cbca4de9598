#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "engine/device/device.h"

namespace ht::engine {

// Targets of packed rows: row r is scored on targets[offsets[r]] … targets[offsets[r + 1] - 1].
struct RowTargets {
  std::span<const std::int32_t> targets;
  std::span<const std::int64_t> offsets;  // [rows + 1]
};

// lse (R) = log-sum-exp of each row of logits (R, vocab), contiguous float32.
at::Tensor logsumexp_rows(const Device& device, const at::Tensor& logits);

// logprobs[t] = logits[r][targets[t]] - lse[r] for the rows [row_begin, row_begin + R) of `targets`; `logprobs` is host
// memory, indexed like targets.targets.
void gather_logprobs(const Device& device, const at::Tensor& logits, const at::Tensor& lse, const RowTargets& targets,
                     std::int64_t row_begin, float* logprobs);

// d(loss)/d(logits) (R, vocab) in the device's compute dtype: sum_k dlogprobs_k · (onehot(target_k) - softmax). A row
// whose dlogprobs are all zero becomes exactly zero. `dlogprobs` is host memory, indexed like targets.targets. The
// logits are used up: where the compute dtype is theirs, the result is written over them.
at::Tensor logprobs_backward(const Device& device, at::Tensor& logits, const at::Tensor& lse, const RowTargets& targets,
                             std::int64_t row_begin, const float* dlogprobs);

// The logprobs of all targets of logits (R, vocab), rows from 0 on, in the logits' dtype.
at::Tensor token_logprobs_reference(const at::Tensor& logits, const RowTargets& targets);

}  // namespace ht::engine
