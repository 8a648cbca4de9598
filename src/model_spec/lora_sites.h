#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model_spec/model_spec.h"

namespace ht::model_spec {

// The shape of an adapter, as the SDK's LoraConfig gives it.
struct LoraConfig {
  int rank = 32;           // power of two, 1…256
  std::uint64_t seed = 0;  // of the initial A
  bool train_attn = true;
  bool train_mlp = true;
  bool train_unembed = true;

  friend bool operator==(const LoraConfig&, const LoraConfig&) = default;
};

enum class SiteGroup { attn, mlp, unembed };

// One linear that can carry LoRA: y = W x + (alpha / r) B A x, A (r, in), B (out, r).
struct LoraSite {
  std::string module;  // "model.layers.0.self_attn.q_proj", "model.unembed_tokens"
  SiteGroup group = SiteGroup::attn;
  int layer = -1;  // -1: unembedding
  int in_features = 0;
  int out_features = 0;
};

inline constexpr double kLoraAlpha = 32.0;

// Every site of the model in the order of a forward pass: per layer q, k, v, o, gate, up, down; then the unembedding.
// The input embedding has none.
std::vector<LoraSite> lora_sites(const ModelSpec& spec);

// Whether the adapter has LoRA on the sites of this group.
bool trains(const LoraConfig& config, SiteGroup group);

// Adapter parameters at config.rank for the chosen groups.
std::int64_t num_lora_parameters(const ModelSpec& spec, const LoraConfig& config);

// Initial A of a site: uniform in ±1/sqrt(in_features), element (i, j) of (rank, in_features) row-major is a function
// of (seed, site.module, i * in_features + j) alone: Philox4x32-10 keyed by seed, counter = (element / 4, hash of the
// module name). The same in every worker, whatever the language. B starts at zero.
std::vector<float> initial_lora_a(const LoraSite& site, int rank, std::uint64_t seed);

}  // namespace ht::model_spec
