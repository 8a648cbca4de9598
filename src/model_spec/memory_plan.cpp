#include "model_spec/memory_plan.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "base/error.h"

namespace ht::model_spec {
namespace {

constexpr std::uint64_t kFloat = 4;
constexpr std::int64_t kHeadChunkRows = 256;  // logits in memory at once
constexpr std::int64_t kDefaultCacheTokens = 32768;
constexpr std::uint64_t kAdapterBuffers =
    6;  // weights, gradient, two moments; a micro-batch's and a request's gradient

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

std::uint64_t activation_bytes(const ModelSpec& spec, const MemoryDemand& demand, std::int64_t num_tokens) {
  if (num_tokens <= 0) return 0;
  const auto tokens = static_cast<std::uint64_t>(num_tokens);
  const auto layers = static_cast<std::uint64_t>(spec.num_hidden_layers);
  std::uint64_t per_token = layers * kept_per_token(spec, demand.lora, demand.recompute);
  // In a backward: what the block computes again, gradients of its input, projection and gate/up; rope's cos and sin;
  // the final hidden states and their gradient.
  const std::uint64_t whole = kept_per_token(spec, demand.lora, RecomputePolicy::none);
  const std::uint64_t again = whole - kept_per_token(spec, demand.lora, demand.recompute);
  per_token += again;
  // What the allocator does not have back in one piece: what a block computes again was freed in its forward between
  // things that are kept, and the head's logits lie where that was. By measurement (docs/benchmarks.md).
  std::uint64_t chunks = 1;
  if (demand.recompute != RecomputePolicy::none) {
    per_token += again;
    chunks = 3;
  }
  per_token += static_cast<std::uint64_t>(spec.hidden_size) * 4 + static_cast<std::uint64_t>(spec.head_dim) +
               static_cast<std::uint64_t>(spec.q_size() + 2 * spec.kv_size()) +
               2 * static_cast<std::uint64_t>(spec.intermediate_size);
  const auto chunk = static_cast<std::uint64_t>(std::min(num_tokens, kHeadChunkRows));
  return (tokens * per_token + chunks * chunk * static_cast<std::uint64_t>(spec.vocab_size)) * kFloat;
}

std::uint64_t cache_bytes_per_token(const ModelSpec& spec) {
  return 2 * static_cast<std::uint64_t>(spec.kv_size()) * static_cast<std::uint64_t>(spec.num_hidden_layers) * kFloat;
}

// Elements of the weights of all linears, the unembedding included (tied or not).
std::uint64_t linear_elements(const ModelSpec& spec) {
  std::uint64_t elements = 0;
  for (const LoraSite& site : lora_sites(spec)) {
    elements += static_cast<std::uint64_t>(site.in_features) * static_cast<std::uint64_t>(site.out_features);
  }
  return elements;
}

}  // namespace

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

std::uint64_t adapter_bytes(const ModelSpec& spec, const LoraConfig& lora) {
  LoraConfig stored = lora;
  stored.rank = padded(lora.rank);
  return static_cast<std::uint64_t>(num_lora_parameters(spec, stored)) * kAdapterBuffers * kFloat;
}

MemoryPlan plan_memory(const ModelSpec& spec, const MemoryDemand& demand, std::int64_t max_seq_len) {
  MemoryPlan plan;
  plan.demand = demand;
  plan.max_seq_len = max_seq_len;
  plan.base_weights = static_cast<std::uint64_t>(num_parameters(spec)) * kFloat;
  if (demand.copy_16_bits) plan.base_copy = linear_elements(spec) * 2;
  const std::uint64_t one = adapter_bytes(spec, demand.lora);
  plan.adapters =
      demand.adapter_bytes > 0 ? demand.adapter_bytes : one * static_cast<std::uint64_t>(demand.num_adapters);
  plan.tenants = static_cast<std::int64_t>(plan.adapters / one);
  plan.activations = activation_bytes(spec, demand, demand.micro_batch_tokens);
  if (max_seq_len > demand.micro_batch_tokens) plan.longest_datum = activation_bytes(spec, demand, max_seq_len);
  plan.kv_cache = static_cast<std::uint64_t>(demand.cache_tokens) * cache_bytes_per_token(spec);
  plan.sampler_versions = demand.version_bytes;
  plan.file_copies = demand.copy_bytes;
  return plan;
}

void divide_free_memory(const ModelSpec& spec, std::int64_t max_seq_len, std::uint64_t free_bytes,
                        MemoryDemand& demand) {
  const std::uint64_t token_bytes = cache_bytes_per_token(spec);
  if (demand.cache_tokens == 0) {
    const auto within = [&](std::uint64_t part) { return static_cast<std::int64_t>(free_bytes / part / token_bytes); };
    // A whole context is worth half of the memory: a longer sequence could not be sampled at all.
    demand.cache_tokens =
        std::max({std::int64_t{1}, std::min(kDefaultCacheTokens, within(4)), std::min(max_seq_len, within(2))});
  } else if (static_cast<std::uint64_t>(demand.cache_tokens) > free_bytes / token_bytes) {
    throw user_error("a key/value cache of " + std::to_string(demand.cache_tokens) + " tokens takes " +
                     size_text(static_cast<std::uint64_t>(demand.cache_tokens) * token_bytes) + ", free are " +
                     size_text(free_bytes));
  }
  const auto less = [](std::uint64_t from, std::uint64_t bytes) { return from - std::min(from, bytes); };
  std::uint64_t left = less(free_bytes, static_cast<std::uint64_t>(demand.cache_tokens) * token_bytes);
  if (demand.adapter_bytes > left) {
    throw user_error("adapter_bytes is " + std::to_string(demand.adapter_bytes) + " (" +
                     size_text(demand.adapter_bytes) + "), free are " + size_text(left) +
                     " beside the key/value cache");
  }
  demand.version_bytes = less(left, demand.adapter_bytes) / 8;
  left = less(left, demand.version_bytes + demand.adapter_bytes + free_bytes / 10 +
                        activation_bytes(spec, demand, demand.micro_batch_tokens));
  demand.copy_bytes = left / 5;
  if (demand.adapter_bytes == 0) demand.adapter_bytes = left - demand.copy_bytes;
}

std::string MemoryPlan::to_text() const {
  std::string text = line("base weights", base_weights, "float32");
  if (base_copy > 0) text += line("base copy", base_copy, "16 bits, for decoding");
  text += line("adapters", adapters, "weights, gradients, moments of those in training");
  text += line("activations", activations,
               "micro-batch of " + std::to_string(demand.micro_batch_tokens) + " tokens, recompute " +
                   std::string(name_of(demand.recompute)));
  text += line("KV cache", kv_cache, std::to_string(demand.cache_tokens) + " tokens");
  if (sampler_versions > 0) text += line("samplers", sampler_versions, "versions kept in memory, at most");
  if (file_copies > 0) text += line("file copies", file_copies, "buffers that are written behind, at most");
  text += line("total", total(), "");
  text += "fits " + std::to_string(tenants) + " tenants of rank " + std::to_string(demand.lora.rank) + " at length " +
          std::to_string(longest_datum > 0 ? demand.micro_batch_tokens : std::max(max_seq_len, std::int64_t{1}));
  if (longest_datum > 0) {
    text += "; a datum of " + std::to_string(max_seq_len) + " tokens takes " + size_text(longest_datum - activations) +
            " more while it runs";
  }
  return text + "\n";
}

}  // namespace ht::model_spec
