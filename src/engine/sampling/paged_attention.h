#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "engine/ops/views.h"
#include "engine/sampling/kv_cache.h"
#include "kernels/cpu/decode_kernels.h"
#include "model_spec/model_spec.h"

namespace ht::engine {

// A cache for the kernels of kernels/cpu/decode_kernels.h, float32.
class PagedKvCache final : public KvCache {
 public:
  PagedKvCache(const model_spec::ModelSpec& spec, std::int32_t num_blocks, std::int32_t block_size);

  HtKvCache layer(int layer) const;
  void copy_block(std::int32_t from, std::int32_t to) override;
  std::unique_ptr<InferenceAttention> attention(std::span<const CachedSequence> sequences) override;

 private:
  const model_spec::ModelSpec& spec_;
  std::int64_t kv_heads_;
  std::int64_t head_dim_;
  std::vector<at::Tensor> keys_;    // (num_blocks, kv_heads, head_dim, block_size) a layer
  std::vector<at::Tensor> values_;  // (num_blocks, kv_heads, block_size, head_dim) a layer
};

// Attention of the batch's rows over their sequences' cached prefixes and themselves; stores their keys and values.
class PagedAttention final : public InferenceAttention {
 public:
  PagedAttention(const model_spec::ModelSpec& spec, PagedKvCache& cache, std::span<const CachedSequence> sequences);

  // Stores k and v of rows [row_begin, row_end), whose rows lie the strides apart. Every row's must be stored before
  // any tile attends: a chunk's rows see each other.
  void store(int layer, const float* k, std::int64_t k_stride, const float* v, std::int64_t v_stride,
             std::int64_t row_begin, std::int64_t row_end) const;
  // What ht_paged_attention takes for `tiles()`.
  HtPagedAttention arguments(int layer, const float* q, std::int64_t q_stride, float* out,
                             std::int64_t out_stride) const;
  std::span<const HtQueryTile> tiles() const { return tiles_; }

  // The two, with tensors.
  at::Tensor attend(int layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) override;

 private:
  const model_spec::ModelSpec& spec_;
  PagedKvCache& cache_;
  std::vector<std::int64_t> slots_;  // of every row
  std::vector<HtQueryTile> tiles_;
  std::int64_t work_ = 0;  // of all tiles, in multiply-adds
};

}  // namespace ht::engine
