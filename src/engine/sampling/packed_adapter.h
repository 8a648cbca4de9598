#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "engine/ops/packed_weight.h"
#include "engine/ops/views.h"

namespace ht::engine {

// LoraFactors with their matrices in panels.
struct PackedFactors {
  struct Part {
    std::int64_t out_begin = 0, rank_begin = 0;
    PackedWeight b;  // (out, rank)
  };
  PackedWeight a;  // (sum of the parts' ranks, in); undefined: this linear has no LoRA
  std::vector<Part> parts;
};

// An adapter for batches of few rows.
struct PackedAdapter {
  float scale = 0;
  std::vector<std::array<PackedFactors, kLoraSlots>> layers;
  PackedFactors unembed;
};

PackedAdapter pack_adapter(const AdapterView& view);

}  // namespace ht::engine
