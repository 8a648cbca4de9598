#pragma once

#include <cstdint>
#include <string>

#include "engine/runtime/base_model.h"
#include "model_spec/memory_plan.h"
#include "model_spec/model_spec.h"

namespace ht::worker {

// The keys of --backend-config.
struct BackendConfig {
  std::int32_t micro_batch_tokens = 2048;                 // most tokens of a micro-batch of several datums
  engine::Recompute recompute = engine::Recompute::none;  // "none", "norms_mlp", "block"
  std::int32_t prefill_chunk_tokens = 512;                // most prompt tokens of a sampling step
  std::int32_t max_sampling_sequences = 64;               // most sequences decoded in a step
  std::int64_t kv_cache_tokens = 0;                       // 0: by the memory plan
  std::uint64_t adapter_bytes = 0;                        // most that adapters in training take; 0: by the memory plan
  std::string device = "auto";                            // "cpu", "cuda"; "auto": cuda where it can be used
  double sampling_share = 0.5;                            // of the time while training and sampling both have work
};

// Reads a JSON object. Throws Error(user) for an unknown key (naming those allowed) or a value out of range.
BackendConfig parse_backend_config(const std::string& json);

inline constexpr std::int32_t kBlockSize = 16;  // tokens of a block of the key/value cache

// How memory is divided, given what the process may take beyond the base model. Throws Error(user) when kv_cache_tokens
// does not fit.
model_spec::MemoryPlan plan_memory(const model_spec::ModelSpec& spec, const BackendConfig& config,
                                   std::int32_t max_seq_len, bool copy_16_bits, std::uint64_t free_bytes);

}  // namespace ht::worker
