#include "scheduler/prefix_cache.h"

#include <algorithm>

namespace ht::scheduler {

std::size_t PrefixCache::KeyHash::operator()(const Key& key) const {
  std::uint64_t hash = key.parent * 0x9E3779B97F4A7C15u;
  for (const std::int32_t token : key.tokens) {
    hash = (hash ^ static_cast<std::uint32_t>(token)) * 0xD6E8FEB86659FD93u;
    hash ^= hash >> 32;
  }
  return hash;
}

PrefixCache::NodeId PrefixCache::root(const std::string& version) {
  const auto [root, is_new] = roots_.try_emplace(version, next_id_);
  if (is_new) ++next_id_;
  return root->second;
}

std::optional<PrefixCache::Hit> PrefixCache::find(NodeId parent, std::span<const std::int32_t> tokens) {
  const auto found = nodes_.find(Key{parent, {tokens.begin(), tokens.end()}});
  if (found == nodes_.end()) return std::nullopt;
  recency_.splice(recency_.end(), recency_, found->second.recency);
  return Hit{found->second.id, found->second.block};
}

PrefixCache::NodeId PrefixCache::insert(NodeId parent, std::span<const std::int32_t> tokens, BlockId block) {
  const auto [entry, is_new] =
      nodes_.try_emplace(Key{parent, {tokens.begin(), tokens.end()}}, Node{next_id_, block, {}});
  if (is_new) {
    ++next_id_;
    allocator_.add_reference(block);
    entry->second.recency = recency_.insert(recency_.end(), &entry->first);
  }
  return entry->second.id;
}

bool PrefixCache::evict_one() {
  for (auto it = recency_.begin(); it != recency_.end(); ++it) {
    const auto found = nodes_.find(**it);
    if (allocator_.references(found->second.block) > 1) continue;
    allocator_.release(found->second.block);
    recency_.erase(it);
    nodes_.erase(found);
    return true;
  }
  return false;
}

std::int32_t PrefixCache::num_evictable() const {
  return static_cast<std::int32_t>(std::count_if(nodes_.begin(), nodes_.end(), [this](const auto& node) {
    return allocator_.references(node.second.block) == 1;
  }));
}

}  // namespace ht::scheduler
