#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "engine/ops/views.h"

namespace ht::engine {

// A sequence's part of a packed batch: rows [row_begin, row_end) at positions from `position` on.
struct CachedSequence {
  std::int64_t row_begin = 0;
  std::int64_t row_end = 0;
  std::int64_t position = 0;
  std::span<const std::int32_t> block_table;
};

// Keys and values of all layers in blocks of `block_size` positions.
class KvCache {
 public:
  KvCache(std::int32_t num_blocks, std::int32_t block_size) : num_blocks_(num_blocks), block_size_(block_size) {}
  virtual ~KvCache() = default;

  std::int32_t num_blocks() const { return num_blocks_; }
  std::int32_t block_size() const { return block_size_; }
  // The cell of a sequence's position: block_table[position / block_size] · block_size + position % block_size.
  std::int64_t slot(const CachedSequence& sequence, std::int64_t position) const {
    return std::int64_t{sequence.block_table[static_cast<std::size_t>(position / block_size_)]} * block_size_ +
           position % block_size_;
  }
  // Copies block `from` to `to` in every layer.
  virtual void copy_block(std::int32_t from, std::int32_t to) = 0;
  // Attention of a batch's rows over their sequences' cached prefixes and themselves; it stores their keys and values.
  virtual std::unique_ptr<InferenceAttention> attention(std::span<const CachedSequence> sequences) = 0;

 private:
  std::int32_t num_blocks_;
  std::int32_t block_size_;
};

}  // namespace ht::engine
