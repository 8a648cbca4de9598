#pragma once

#include <span>

#include "engine/device/device.h"
#include "engine/ops/rope.h"
#include "engine/ops/views.h"

namespace ht::engine {

// What every layer of one pass over a packed batch shares.
struct BlockContext {
  const Device& device;
  const AttentionRanges& ranges;
  const RopeTable& rope;
  std::span<const LoraSegment> segments;
  InferenceAttention* inference = nullptr;  // nullptr: packed causal attention
};

}  // namespace ht::engine
