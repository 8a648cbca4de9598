#include "scheduler/block_allocator.h"

#include "base/error.h"

namespace ht::scheduler {

BlockAllocator::BlockAllocator(std::int32_t num_blocks) {
  if (num_blocks < 1) throw server_error("a cache of " + std::to_string(num_blocks) + " blocks: at least 1 is needed");
  references_.assign(static_cast<std::size_t>(num_blocks), 0);
  free_.reserve(references_.size());
  for (BlockId block = num_blocks; block-- > 0;) free_.push_back(block);
}

std::optional<BlockId> BlockAllocator::allocate() {
  if (free_.empty()) return std::nullopt;
  const BlockId block = free_.back();
  free_.pop_back();
  references_[static_cast<std::size_t>(block)] = 1;
  return block;
}

void BlockAllocator::add_reference(BlockId block) {
  std::int32_t& references = references_.at(static_cast<std::size_t>(block));
  if (references == 0) throw server_error("cache block " + std::to_string(block) + " is free: it cannot be shared");
  ++references;
}

bool BlockAllocator::release(BlockId block) {
  std::int32_t& references = references_.at(static_cast<std::size_t>(block));
  if (references == 0) throw server_error("cache block " + std::to_string(block) + " was released twice");
  if (--references > 0) return false;
  free_.push_back(block);
  return true;
}

}  // namespace ht::scheduler
