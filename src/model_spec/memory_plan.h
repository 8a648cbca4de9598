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
  bool copy_16_bits = false;        // the linears' weights also lie in memory in the checkpoint's 16 bits
  std::int64_t cache_tokens = 0;    // of all sequences being sampled
  std::uint64_t version_bytes = 0;  // most that sampler versions may take
};

// Bytes; everything is float32 but the 16-bit copy.
struct MemoryPlan {
  std::uint64_t base_weights = 0;
  std::uint64_t base_copy = 0;  // the linears in 16 bits
  std::uint64_t adapters = 0;   // master weights, gradient and two Adam moments, ranks padded to 8
  std::uint64_t activations =
      0;  // kept by all blocks, the working set of one block and of the head, a batch's gradients
  std::uint64_t kv_cache = 0;
  std::uint64_t sampler_versions = 0;
  MemoryDemand demand;

  std::uint64_t total() const {
    return base_weights + base_copy + adapters + activations + kv_cache + sampler_versions;
  }
  // One line a category and one for the total: "base weights      513.2 MiB".
  std::string to_text() const;
};

MemoryPlan plan_memory(const ModelSpec& spec, const MemoryDemand& demand);

// Divides `free_bytes`, what is left once the base is loaded, between sampling's two stores: sets version_bytes, and
// cache_tokens where it is 0: room for 32,768 tokens within a quarter of the free memory, or for one sequence of
// max_seq_len within half of it, whichever is more. Throws Error(user) when the given cache_tokens do not fit.
void divide_free_memory(const ModelSpec& spec, std::int64_t max_seq_len, std::uint64_t free_bytes,
                        MemoryDemand& demand);

// "513.1 MiB".
std::string size_text(std::uint64_t bytes);

}  // namespace ht::model_spec
