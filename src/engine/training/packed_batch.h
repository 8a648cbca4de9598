#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/ops/token_logprobs.h"
#include "engine/ops/views.h"
#include "engine/training/trainer.h"

namespace ht::engine {

// The datums of all items, one after another.
struct PackedBatch {
  // An item's place in the packed arrays.
  struct ItemRange {
    std::int64_t row_begin = 0, row_end = 0;
    std::int64_t target_begin = 0, target_end = 0;  // in `targets`
    std::int64_t source_target_begin = 0;           // in the item's TrainBatch::targets
  };

  std::vector<std::int32_t> tokens, positions, cu_seqlens;
  std::vector<std::int32_t> targets;
  std::vector<std::int64_t> target_offsets;  // [rows + 1]
  std::vector<ItemRange> items;
  std::vector<Adapter*> adapters;     // distinct, in order; adapter i has the rows of segment i
  std::vector<LoraSegment> segments;  // without the adapters' views, which the caller fills in

  PackedSequences sequences() const { return {tokens, positions, cu_seqlens}; }
  RowTargets row_targets() const { return {targets, target_offsets}; }
};

// Throws Error(user) for a token or target outside the vocabulary or arrays of the wrong length, Error(server) when an
// adapter's items are not adjacent.
PackedBatch pack(std::span<const MicroBatchItem> items, int vocab_size);

}  // namespace ht::engine
