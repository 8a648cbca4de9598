#include "scheduler/block_allocator.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

#include "base/error.h"
#include "scheduler/prefix_cache.h"

namespace ht::scheduler {
namespace {

TEST(BlockAllocator, RandomOperationsKeepTheCounts) {
  std::mt19937 random(1);
  BlockAllocator allocator(20);
  std::vector<BlockId> held;  // one entry a reference
  for (int i = 0; i < 20000; ++i) {
    if (random() % 2 == 0) {
      const auto block = allocator.allocate();
      EXPECT_EQ(block.has_value(), std::set<BlockId>(held.begin(), held.end()).size() < 20);
      if (block) {
        EXPECT_EQ(std::count(held.begin(), held.end(), *block), 0);
        held.push_back(*block);
      }
    } else if (!held.empty()) {
      const std::size_t index = random() % held.size();
      const BlockId block = held[index];
      if (random() % 3 == 0) {
        allocator.add_reference(block);
        held.push_back(block);
      } else {
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(index));
        EXPECT_EQ(allocator.release(block), std::count(held.begin(), held.end(), block) == 0);
      }
      EXPECT_EQ(allocator.references(block), std::count(held.begin(), held.end(), block));
    }
    EXPECT_EQ(allocator.num_free(), 20 - std::ssize(std::set<BlockId>(held.begin(), held.end())));
  }
}

TEST(BlockAllocator, MistakesAreErrors) {
  BlockAllocator allocator(1);
  EXPECT_THROW(allocator.release(0), Error);
  EXPECT_THROW(allocator.add_reference(0), Error);
  EXPECT_THROW(BlockAllocator(0), Error);
}

TEST(PrefixCache, FindsExactPrefixesAndEvictsTheLeastRecentlyUsed) {
  BlockAllocator allocator(3);
  PrefixCache cache(allocator);
  const std::vector<std::int32_t> a{1, 2}, b{3, 4}, c{5, 6};
  const auto root = cache.root("v");
  const BlockId first = allocator.allocate().value(), second = allocator.allocate().value();
  const auto node_a = cache.insert(root, a, first);
  const auto node_b = cache.insert(root, b, second);
  EXPECT_EQ(cache.insert(root, a, second), node_a);  // known already: no second block
  EXPECT_FALSE(cache.find(node_a, b));
  EXPECT_FALSE(cache.find(cache.root("w"), a));
  EXPECT_NE(node_a, node_b);

  EXPECT_EQ(cache.num_evictable(), 0);
  EXPECT_FALSE(cache.evict_one());  // both are in use
  allocator.release(first);
  allocator.release(second);
  EXPECT_EQ(cache.num_evictable(), 2);
  EXPECT_EQ(cache.find(root, a)->block, first);
  EXPECT_TRUE(cache.evict_one());
  EXPECT_FALSE(cache.find(root, b));
  EXPECT_TRUE(cache.find(root, a));

  cache.drop_version("v");
  EXPECT_FALSE(cache.find(cache.root("v"), a));
  EXPECT_TRUE(cache.evict_one());
  EXPECT_EQ(allocator.num_free(), 3);
  EXPECT_FALSE(cache.evict_one());
}

}  // namespace
}  // namespace ht::scheduler
