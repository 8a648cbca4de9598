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
  std::uint64_t adapter_bytes = 0;  // most that adapters in training may take; 0: what num_adapters take
  std::uint64_t copy_bytes = 0;     // most that buffers may take that are written to files behind
  std::uint64_t version_bytes = 0;  // most that sampler versions may take
};

// Bytes; everything is float32 but the 16-bit copy.
struct MemoryPlan {
  std::uint64_t base_weights = 0;
  std::uint64_t base_copy = 0;    // the linears in 16 bits
  std::uint64_t adapters = 0;     // adapter_bytes() of each
  std::uint64_t activations = 0;  // kept by all blocks, the working set of one block and of the head
  std::uint64_t kv_cache = 0;
  std::uint64_t sampler_versions = 0;
  std::uint64_t file_copies = 0;
  std::uint64_t longest_datum = 0;  // activations of one of max_seq_len tokens, where that is beyond a micro-batch
  std::int64_t max_seq_len = 0;
  std::int64_t tenants = 0;  // adapters of demand.lora that `adapters` holds
  MemoryDemand demand;

  std::uint64_t total() const {
    return base_weights + base_copy + adapters + activations + kv_cache + sampler_versions + file_copies;
  }
  // One line a category and one for the total: "base weights      513.2 MiB"; then how many adapters fit.
  std::string to_text() const;
};

// What an adapter in training takes: master weights, gradient and two Adam moments, and the gradients of a micro-batch
// and of a request that takes several; ranks padded to 8.
std::uint64_t adapter_bytes(const ModelSpec& spec, const LoraConfig& lora);

// `max_seq_len`: of a datum; 0: none is longer than a micro-batch.
MemoryPlan plan_memory(const ModelSpec& spec, const MemoryDemand& demand, std::int64_t max_seq_len = 0);

// Divides `free_bytes`, what is left once the base is loaded. Sets cache_tokens where it is 0: room for 32,768 tokens
// within a quarter of the free memory, or for one sequence of max_seq_len within half of it, whichever is more;
// version_bytes: an eighth of what is left; and of the rest, less the activations and a tenth of the free memory that
// stays free, a fifth as copy_bytes and where it is 0 the remainder as adapter_bytes. Throws Error(user) when the given
// cache_tokens or adapter_bytes do not fit.
void divide_free_memory(const ModelSpec& spec, std::int64_t max_seq_len, std::uint64_t free_bytes,
                        MemoryDemand& demand);

// "513.1 MiB".
std::string size_text(std::uint64_t bytes);

}  // namespace ht::model_spec
