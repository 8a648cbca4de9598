#include "model_spec/memory_plan.h"

#include <algorithm>
#include <array>
#include <cstdio>

namespace ht::model_spec {
namespace {

constexpr std::uint64_t kFloat = 4;
constexpr std::int64_t kHeadChunkRows = 256;  // logits in memory at once

std::string size_text(std::uint64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < kUnits.size()) {
    value /= 1024.0;
    ++unit;
  }
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return text.data();
}

std::string line(const std::string& name, std::uint64_t bytes, const std::string& note) {
  std::array<char, 64> head;
  std::snprintf(head.data(), head.size(), "%-13s %11s", name.c_str(), size_text(bytes).c_str());
  return head.data() + (note.empty() ? "" : "  (" + note + ")") + "\n";
}

std::string_view name_of(RecomputePolicy policy) {
  switch (policy) {
    case RecomputePolicy::none:
      return "none";
    case RecomputePolicy::norms_mlp:
      return "norms_mlp";
    case RecomputePolicy::block:
      break;
  }
  return "block";
}

int padded(int rank) {
  return (rank + 7) / 8 * 8;
}

// Floats a token that a block keeps between its forward and its backward.
std::uint64_t kept_per_token(const ModelSpec& spec, const LoraConfig& lora, RecomputePolicy policy) {
  const auto hidden = static_cast<std::uint64_t>(spec.hidden_size);
  if (policy == RecomputePolicy::block) return hidden;
  const auto q = static_cast<std::uint64_t>(spec.q_size());
  const auto kv = static_cast<std::uint64_t>(spec.kv_size());
  const auto rank = static_cast<std::uint64_t>(padded(lora.rank));
  std::uint64_t floats = 2 * hidden + 2;  // the block's input, its middle, the norms' scales
  floats += q + 2 * kv;                   // fused projection
  floats += q + static_cast<std::uint64_t>(spec.num_attention_heads);  // attended, logsumexp
  if (spec.qk_norm) {
    floats += q + kv + static_cast<std::uint64_t>(spec.num_attention_heads + spec.num_key_value_heads);
  }
  if (lora.train_attn) floats += 4 * rank;  // A x of q, k, v, o
  if (lora.train_mlp) floats += 3 * rank;   // of gate, up, down
  if (policy == RecomputePolicy::none) floats += 2 * hidden + 3 * static_cast<std::uint64_t>(spec.intermediate_size);
  return floats;
}

std::uint64_t activation_floats(const ModelSpec& spec, const MemoryDemand& demand) {
  const auto tokens = static_cast<std::uint64_t>(demand.micro_batch_tokens);
  const auto layers = static_cast<std::uint64_t>(spec.num_hidden_layers);
  std::uint64_t per_token = layers * kept_per_token(spec, demand.lora, demand.recompute);
  // In a backward: what the block computes again, gradients of its input, projection and gate/up; rope's cos and sin;
  // the final hidden states and their gradient.
  const std::uint64_t whole = kept_per_token(spec, demand.lora, RecomputePolicy::none);
  per_token += whole - kept_per_token(spec, demand.lora, demand.recompute);
  per_token += static_cast<std::uint64_t>(spec.hidden_size) * 4 + static_cast<std::uint64_t>(spec.head_dim) +
               static_cast<std::uint64_t>(spec.q_size() + 2 * spec.kv_size()) +
               2 * static_cast<std::uint64_t>(spec.intermediate_size);
  const auto chunk = static_cast<std::uint64_t>(std::min(demand.micro_batch_tokens, kHeadChunkRows));
  return tokens * per_token + chunk * static_cast<std::uint64_t>(spec.vocab_size);
}

}  // namespace

MemoryPlan plan_memory(const ModelSpec& spec, const MemoryDemand& demand) {
  MemoryPlan plan;
  plan.demand = demand;
  plan.base_weights = static_cast<std::uint64_t>(num_parameters(spec)) * kFloat;
  LoraConfig stored = demand.lora;
  stored.rank = padded(demand.lora.rank);
  plan.adapters = static_cast<std::uint64_t>(num_lora_parameters(spec, stored)) * 4 * kFloat *
                  static_cast<std::uint64_t>(demand.num_adapters);
  if (demand.micro_batch_tokens > 0) plan.activations = activation_floats(spec, demand) * kFloat;
  plan.kv_cache = static_cast<std::uint64_t>(demand.cache_tokens) * 2 * static_cast<std::uint64_t>(spec.kv_size()) *
                  static_cast<std::uint64_t>(spec.num_hidden_layers) * kFloat;
  return plan;
}

std::string MemoryPlan::to_text() const {
  return line("base weights", base_weights, "float32") +
         line("adapters", adapters,
              std::to_string(demand.num_adapters) + " of rank " + std::to_string(demand.lora.rank) +
                  ": weights, gradient, moments") +
         line("activations", activations,
              "micro-batch of " + std::to_string(demand.micro_batch_tokens) + " tokens, recompute " +
                  std::string(name_of(demand.recompute))) +
         line("KV cache", kv_cache, std::to_string(demand.cache_tokens) + " tokens") + line("total", total(), "");
}

}  // namespace ht::model_spec
