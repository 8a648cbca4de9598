#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine/device/device.h"
#include "engine/sampling/kv_cache.h"
#include "model_spec/model_spec.h"

namespace ht::engine {

// A cache in a device's memory, for devices without decode kernels of their own: a step copies its sequences' keys and
// values together and runs the device's packed attention on them.
class GatheredKvCache final : public KvCache {
 public:
  // Allocates num_blocks · block_size positions in every layer, in the device's compute dtype.
  GatheredKvCache(const Device& device, const model_spec::ModelSpec& spec, std::int32_t num_blocks,
                  std::int32_t block_size);

  void copy_block(std::int32_t from, std::int32_t to) override;
  std::unique_ptr<InferenceAttention> attention(std::span<const CachedSequence> sequences) override;

 private:
  class Attention;

  const Device& device_;
  const model_spec::ModelSpec& spec_;
  std::vector<at::Tensor> keys_, values_;  // (num_blocks · block_size, kv_heads, head_dim) a layer
};

}  // namespace ht::engine
