#include "engine/ops/token_logprobs.h"

#include <ATen/ATen.h>

#include "engine/ops/parallel_rows.h"
#include "kernels/cpu/train_kernels.h"

namespace ht::engine {

at::Tensor logsumexp_rows(const at::Tensor& logits) {
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  at::Tensor lse = at::empty({rows}, logits.options());
  const float* x = logits.const_data_ptr<float>();
  float* out = lse.data_ptr<float>();
  parallel_rows(rows, vocab, [&](std::int64_t begin, std::int64_t end) { ht_logsumexp(x, vocab, out, begin, end); });
  return lse;
}

void gather_logprobs(const at::Tensor& logits, const at::Tensor& lse, const RowTargets& targets, std::int64_t row_begin,
                     float* logprobs) {
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  const float* x = logits.const_data_ptr<float>();
  const float* l = lse.const_data_ptr<float>();
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t t = targets.offsets[row_begin + r]; t < targets.offsets[row_begin + r + 1]; ++t) {
      logprobs[t] = x[r * vocab + targets.targets[t]] - l[r];
    }
  }
}

void logprobs_backward(at::Tensor& logits, const at::Tensor& lse, const RowTargets& targets, std::int64_t row_begin,
                       const float* dlogprobs) {
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  float* x = logits.data_ptr<float>();
  const float* l = lse.const_data_ptr<float>();
  const std::int64_t* offsets = targets.offsets.data() + row_begin;
  parallel_rows(rows, vocab, [&](std::int64_t begin, std::int64_t end) {
    ht_dlogits(x, vocab, l, targets.targets.data(), dlogprobs, offsets, begin, end);
  });
}

}  // namespace ht::engine
