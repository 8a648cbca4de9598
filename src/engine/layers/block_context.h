#pragma once

#include <span>

#include "engine/ops/rope.h"
#include "engine/ops/views.h"

namespace ht::engine {

// What every layer of one pass over a packed batch shares.
struct BlockContext {
  const PackedSequences& batch;
  const RopeTable& rope;
  std::span<const LoraSegment> segments;
  InferenceAttention* inference = nullptr;  // nullptr: packed causal attention
};

}  // namespace ht::engine
