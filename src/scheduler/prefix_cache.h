#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "scheduler/block_allocator.h"

namespace ht::scheduler {

// Full blocks of prompts by content: a node is a block's tokens under a parent node, a root is an adapter version. So a
// block is found only by the exact tokens of everything before it. The cache holds one reference on each of its blocks;
// the least recently used one that nobody else holds is given up when blocks run out.
class PrefixCache {
 public:
  using NodeId = std::uint64_t;
  struct Hit {
    NodeId node;
    BlockId block;
  };

  explicit PrefixCache(BlockAllocator& allocator) : allocator_(allocator) {}

  NodeId root(const std::string& version);
  // The block of `tokens` that follows `parent`, and marks it as used.
  std::optional<Hit> find(NodeId parent, std::span<const std::int32_t> tokens);
  // Adds `block` (and a reference to it) unless these tokens are known already. Returns their node.
  NodeId insert(NodeId parent, std::span<const std::int32_t> tokens, BlockId block);

  // Gives up one block. False when all of them are in use.
  bool evict_one();
  std::int32_t num_evictable() const;
  // The version's blocks are not found any more and go as others need them.
  void drop_version(const std::string& version) { roots_.erase(version); }
  std::size_t size() const { return nodes_.size(); }

 private:
  struct Key {
    NodeId parent;
    std::vector<std::int32_t> tokens;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    std::size_t operator()(const Key& key) const;
  };
  struct Node {
    NodeId id;
    BlockId block;
    std::list<const Key*>::iterator recency;
  };

  BlockAllocator& allocator_;
  std::map<std::string, NodeId> roots_;
  std::unordered_map<Key, Node, KeyHash> nodes_;
  std::list<const Key*> recency_;  // least recently used first
  NodeId next_id_ = 1;             // never used twice: a child of an evicted node is found by nobody
};

}  // namespace ht::scheduler
