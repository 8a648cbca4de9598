#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace ht::scheduler {

using BlockId = std::int32_t;

// The cache blocks and who holds them: a block is free while nobody holds a reference to it.
class BlockAllocator {
 public:
  explicit BlockAllocator(std::int32_t num_blocks);

  // A free block with one reference, or nothing.
  std::optional<BlockId> allocate();
  void add_reference(BlockId block);
  // True when this was the last one: the block is free now.
  bool release(BlockId block);

  std::int32_t references(BlockId block) const { return references_[static_cast<std::size_t>(block)]; }
  std::int32_t num_blocks() const { return static_cast<std::int32_t>(references_.size()); }
  std::int32_t num_free() const { return static_cast<std::int32_t>(free_.size()); }

 private:
  std::vector<std::int32_t> references_;
  std::vector<BlockId> free_;  // last in, first out: warm blocks first
};

}  // namespace ht::scheduler
