#include "engine/sampling/paged_attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ht::engine {

namespace {

// Below this many multiply-adds waking a second thread costs more than it saves.
constexpr std::int64_t kParallelWork = 200'000;

}  // namespace

PagedKvCache::PagedKvCache(const model_spec::ModelSpec& spec, std::int32_t num_blocks, std::int32_t block_size)
    : KvCache(num_blocks, block_size), spec_(spec), kv_heads_(spec.num_key_value_heads), head_dim_(spec.head_dim) {
  for (int layer = 0; layer < spec.num_hidden_layers; ++layer) {
    keys_.push_back(at::empty({num_blocks, kv_heads_, head_dim_, block_size}, at::kFloat));
    values_.push_back(at::empty({num_blocks, kv_heads_, block_size, head_dim_}, at::kFloat));
  }
}

HtKvCache PagedKvCache::layer(int layer) const {
  const auto index = static_cast<std::size_t>(layer);
  return {keys_[index].data_ptr<float>(), values_[index].data_ptr<float>(), kv_heads_, head_dim_, block_size()};
}

void PagedKvCache::copy_block(std::int32_t from, std::int32_t to) {
  const std::int64_t size = kv_heads_ * head_dim_ * block_size();
  for (const auto* tensors : {&keys_, &values_}) {
    for (const at::Tensor& tensor : *tensors) {
      float* data = tensor.data_ptr<float>();
      std::memcpy(data + to * size, data + from * size, static_cast<std::size_t>(size) * sizeof(float));
    }
  }
}

std::unique_ptr<InferenceAttention> PagedKvCache::attention(std::span<const CachedSequence> sequences) {
  return std::make_unique<PagedAttention>(spec_, *this, sequences);
}

PagedAttention::PagedAttention(const model_spec::ModelSpec& spec, PagedKvCache& cache,
                               std::span<const CachedSequence> sequences)
    : spec_(spec), cache_(cache) {
  const std::int64_t group = spec.num_attention_heads / spec.num_key_value_heads;
  const std::int64_t heads_a_tile = std::min<std::int64_t>(group, HT_ATTENTION_MAX_ROWS);
  const std::int64_t rows_a_tile = HT_ATTENTION_MAX_ROWS / heads_a_tile;
  for (const CachedSequence& sequence : sequences) {
    for (std::int64_t row = sequence.row_begin; row < sequence.row_end; ++row) {
      const std::int64_t position = sequence.position + row - sequence.row_begin;
      slots_.push_back(cache.slot(sequence, position));
    }
    for (std::int64_t row = sequence.row_begin; row < sequence.row_end; row += rows_a_tile) {
      const std::int64_t rows = std::min(rows_a_tile, sequence.row_end - row);
      const std::int64_t position = sequence.position + row - sequence.row_begin;
      for (std::int64_t head = 0; head < spec.num_attention_heads; head += group) {
        for (std::int64_t part = 0; part < group; part += heads_a_tile) {
          const std::int64_t heads = std::min(heads_a_tile, group - part);
          tiles_.push_back({sequence.block_table.data(), row, rows, position, head + part, heads});
          work_ += rows * heads * (position + rows) * spec.head_dim * 2;
        }
      }
    }
  }
  // Longest first, for balance; stable, so that the same batch always gives the same order.
  std::stable_sort(tiles_.begin(), tiles_.end(),
                   [](const HtQueryTile& a, const HtQueryTile& b) { return a.position > b.position; });
}

void PagedAttention::store(int layer, const float* k, std::int64_t k_stride, const float* v, std::int64_t v_stride,
                           std::int64_t row_begin, std::int64_t row_end) const {
  const HtKvCache cache = cache_.layer(layer);
  ht_store_kv(&cache, k, k_stride, v, v_stride, slots_.data(), row_begin, row_end);
}

HtPagedAttention PagedAttention::arguments(int layer, const float* q, std::int64_t q_stride, float* out,
                                           std::int64_t out_stride) const {
  HtPagedAttention attention{};
  attention.cache = cache_.layer(layer);
  attention.q = q;
  attention.q_stride = q_stride;
  attention.out = out;
  attention.out_stride = out_stride;
  attention.heads = spec_.num_attention_heads;
  attention.window = spec_.sliding_window[static_cast<std::size_t>(layer)];
  attention.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(spec_.head_dim)));
  return attention;
}

at::Tensor PagedAttention::attend(int layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const std::int64_t rows = q.size(0);
  at::Tensor out = at::empty({rows, spec_.q_size()}, q.options());
  const HtPagedAttention attention =
      arguments(layer, q.data_ptr<float>(), q.stride(0), out.data_ptr<float>(), spec_.q_size());
  store(layer, k.data_ptr<float>(), k.stride(0), v.data_ptr<float>(), v.stride(0), 0, rows);
  const auto tiles = static_cast<std::int64_t>(tiles_.size());
  if (work_ < kParallelWork) {
    ht_paged_attention(&attention, tiles_.data(), 0, tiles);
    return out;
  }
  // Interleaved, so that each thread gets as many long tiles as short ones.
  const std::int64_t parts = std::min<std::int64_t>(at::get_num_threads(), tiles);
  at::parallel_for(0, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      for (std::int64_t tile = part; tile < tiles; tile += parts) {
        ht_paged_attention(&attention, tiles_.data(), tile, tile + 1);
      }
    }
  });
  return out;
}

}  // namespace ht::engine
