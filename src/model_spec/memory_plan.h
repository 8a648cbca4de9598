#pragma once

// What a worker's memory goes to, by category, from the shapes alone: computed before anything is allocated.

#include <cstdint>
#include <string>

#include "model_spec/lora_sites.h"
#include "model_spec/model_spec.h"

namespace ht::model_spec {

// What a block keeps from its forward pass for its backward.
//   none       everything
//   norms_mlp  all but the norms' outputs and the MLP's intermediates
//   block      the block's input
enum class RecomputePolicy { none, norms_mlp, block };

struct MemoryDemand {
  LoraConfig lora;                      // of each adapter
  int num_adapters = 1;                 // in training at once
  std::int64_t micro_batch_tokens = 0;  // packed tokens of the largest micro-batch
  RecomputePolicy recompute = RecomputePolicy::none;
  std::int64_t cache_tokens = 0;  // of all sequences being sampled
};

// Bytes; everything is float32.
struct MemoryPlan {
  std::uint64_t base_weights = 0;
  std::uint64_t adapters = 0;     // master weights, gradient and two Adam moments, ranks padded to 8
  std::uint64_t activations = 0;  // kept by all blocks, and the working set of one block and of the head
  std::uint64_t kv_cache = 0;
  MemoryDemand demand;

  std::uint64_t total() const { return base_weights + adapters + activations + kv_cache; }
  // One line a category and one for the total: "base weights      513.2 MiB".
  std::string to_text() const;
};

MemoryPlan plan_memory(const ModelSpec& spec, const MemoryDemand& demand);

}  // namespace ht::model_spec
