#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

namespace ht::engine {

// Targets of packed rows: row r is scored on targets[offsets[r]] … targets[offsets[r + 1] - 1].
struct RowTargets {
  std::span<const std::int32_t> targets;
  std::span<const std::int64_t> offsets;  // [rows + 1]
};

// lse (R) = log-sum-exp of each row of logits (R, vocab), contiguous float32.
at::Tensor logsumexp_rows(const at::Tensor& logits);

// logprobs[t] = logits[r][targets[t]] - lse[r] for the rows [row_begin, row_begin + R) of `targets`; `logprobs` is
// indexed like targets.targets.
void gather_logprobs(const at::Tensor& logits, const at::Tensor& lse, const RowTargets& targets, std::int64_t row_begin,
                     float* logprobs);

// Overwrites logits by d(loss)/d(logits) = sum_k dlogprobs_k · (onehot(target_k) - softmax). A row whose dlogprobs are
// all zero becomes exactly zero. `dlogprobs` is indexed like targets.targets.
void logprobs_backward(at::Tensor& logits, const at::Tensor& lse, const RowTargets& targets, std::int64_t row_begin,
                       const float* dlogprobs);

}  // namespace ht::engine
