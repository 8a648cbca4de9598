#include "engine/sampling/gathered_attention.h"

#include <ATen/ATen.h>

#include "engine/ops/attention.h"
#include "engine/ops/host_data.h"

namespace ht::engine {

class GatheredKvCache::Attention final : public InferenceAttention {
 public:
  Attention(GatheredKvCache& cache, std::span<const CachedSequence> sequences) : cache_(cache) {
    std::vector<std::int64_t> stored, seen;
    for (const CachedSequence& sequence : sequences) {
      const std::int64_t end = sequence.position + sequence.row_end - sequence.row_begin;
      for (std::int64_t position = 0; position < end; ++position) {
        seen.push_back(cache.slot(sequence, position));
        if (position >= sequence.position) stored.push_back(seen.back());
      }
      cu_q_.push_back(static_cast<std::int32_t>(stored.size()));
      cu_k_.push_back(static_cast<std::int32_t>(seen.size()));
    }
    const auto on_device = [&](const std::vector<std::int64_t>& slots) {
      return host_data(std::span<const std::int64_t>(slots)).clone().to(cache.device_.torch_device());
    };
    stored_ = on_device(stored);
    seen_ = on_device(seen);
    ranges_ = attention_ranges(cache.device_, cu_q_, cu_k_);
  }

  at::Tensor attend(int layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) override {
    const auto index = static_cast<std::size_t>(layer);
    cache_.keys_[index].index_copy_(0, stored_, k);
    cache_.values_[index].index_copy_(0, stored_, v);
    std::vector<at::Tensor> saved;
    return cache_.device_.attention_forward(q, cache_.keys_[index].index_select(0, seen_),
                                            cache_.values_[index].index_select(0, seen_), ranges_,
                                            cache_.spec_.sliding_window[index], saved);
  }

 private:
  GatheredKvCache& cache_;
  std::vector<std::int32_t> cu_q_ = {0}, cu_k_ = {0};
  at::Tensor stored_, seen_;  // cells of the batch's rows, of every position that they may see
  AttentionRanges ranges_;
};

GatheredKvCache::GatheredKvCache(const Device& device, const model_spec::ModelSpec& spec, std::int32_t num_blocks,
                                 std::int32_t block_size)
    : KvCache(num_blocks, block_size), device_(device), spec_(spec) {
  const std::vector<std::int64_t> shape = {std::int64_t{num_blocks} * block_size, spec.num_key_value_heads,
                                           spec.head_dim};
  for (int layer = 0; layer < spec.num_hidden_layers; ++layer) {
    keys_.push_back(at::empty(shape, device.options()));
    values_.push_back(at::empty(shape, device.options()));
  }
}

void GatheredKvCache::copy_block(std::int32_t from, std::int32_t to) {
  const std::int64_t size = block_size();
  for (const auto* tensors : {&keys_, &values_}) {
    for (const at::Tensor& tensor : *tensors)
      tensor.narrow(0, to * size, size).copy_(tensor.narrow(0, from * size, size));
  }
}

std::unique_ptr<InferenceAttention> GatheredKvCache::attention(std::span<const CachedSequence> sequences) {
  return std::make_unique<Attention>(*this, sequences);
}

}  // namespace ht::engine
