#include "engine/ops/attention.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <vector>

#include "engine/ops/host_data.h"

namespace ht::engine {

AttentionRanges attention_ranges(const Device& device, std::span<const std::int32_t> q,
                                 std::span<const std::int32_t> k) {
  AttentionRanges ranges{q, k.empty() ? q : k, host_data(q).to(device.torch_device()), {}};
  ranges.k_on_device = k.empty() ? ranges.q_on_device : host_data(k).to(device.torch_device());
  return ranges;
}

at::Tensor attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const AttentionRanges& ranges, std::int64_t window) {
  const std::int64_t heads = q.size(1), d = q.size(2);
  std::vector<at::Tensor> out;
  for (std::size_t i = 0; i + 1 < ranges.q.size(); ++i) {
    const std::int64_t queries = ranges.q[i + 1] - ranges.q[i], keys = ranges.k[i + 1] - ranges.k[i];
    if (queries == 0) continue;
    const auto of_heads = [&](const at::Tensor& x, std::int64_t row, std::int64_t rows) {  // (heads, rows, d)
      return x.narrow(0, row, rows).transpose(0, 1).repeat_interleave(heads / x.size(1), 0);
    };
    const at::Tensor qs = of_heads(q, ranges.q[i], queries), ks = of_heads(k, ranges.k[i], keys),
                     vs = of_heads(v, ranges.k[i], keys);
    const auto index = at::TensorOptions(q.device()).dtype(at::kLong);
    const at::Tensor row = at::arange(keys - queries, keys, index).unsqueeze(1), column = at::arange(keys, index);
    at::Tensor hidden = column.gt(row);
    if (window > 0) hidden = hidden.logical_or(column.le(row - window));
    const at::Tensor scores = (at::matmul(qs, ks.transpose(1, 2)) / std::sqrt(static_cast<double>(d)))
                                  .masked_fill(hidden, -std::numeric_limits<double>::infinity());
    out.push_back(at::matmul(at::softmax(scores, -1), vs).transpose(0, 1).reshape({queries, heads * d}));
  }
  return at::cat(out, 0);
}

}  // namespace ht::engine
