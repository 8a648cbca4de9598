#include "model_spec/lora_sites.h"

#include <cmath>
#include <cstddef>
#include <string_view>

#include "base/philox.h"

namespace ht::model_spec {
namespace {

// FNV-1a, 64 bit: fixed for ever, as initial_lora_a depends on it.
std::uint64_t hash_name(std::string_view name) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

}  // namespace

bool trains(const LoraConfig& config, SiteGroup group) {
  switch (group) {
    case SiteGroup::attn:
      return config.train_attn;
    case SiteGroup::mlp:
      return config.train_mlp;
    case SiteGroup::unembed:
      return config.train_unembed;
  }
  return false;
}

std::vector<LoraSite> lora_sites(const ModelSpec& spec) {
  std::vector<LoraSite> sites;
  sites.reserve(static_cast<std::size_t>(spec.num_hidden_layers) * 7 + 1);
  for (int layer = 0; layer < spec.num_hidden_layers; ++layer) {
    const std::string attn = "model.layers." + std::to_string(layer) + ".self_attn.";
    const std::string mlp = "model.layers." + std::to_string(layer) + ".mlp.";
    const int hidden = spec.hidden_size;
    const int inner = spec.intermediate_size;
    sites.push_back({attn + "q_proj", SiteGroup::attn, layer, hidden, spec.q_size()});
    sites.push_back({attn + "k_proj", SiteGroup::attn, layer, hidden, spec.kv_size()});
    sites.push_back({attn + "v_proj", SiteGroup::attn, layer, hidden, spec.kv_size()});
    sites.push_back({attn + "o_proj", SiteGroup::attn, layer, spec.q_size(), hidden});
    sites.push_back({mlp + "gate_proj", SiteGroup::mlp, layer, hidden, inner});
    sites.push_back({mlp + "up_proj", SiteGroup::mlp, layer, hidden, inner});
    sites.push_back({mlp + "down_proj", SiteGroup::mlp, layer, inner, hidden});
  }
  sites.push_back({"model.unembed_tokens", SiteGroup::unembed, -1, spec.hidden_size, spec.vocab_size});
  return sites;
}

std::int64_t num_lora_parameters(const ModelSpec& spec, const LoraConfig& config) {
  std::int64_t count = 0;
  for (const LoraSite& site : lora_sites(spec)) {
    if (trains(config, site.group)) {
      count += std::int64_t{config.rank} * (std::int64_t{site.in_features} + site.out_features);
    }
  }
  return count;
}

std::vector<float> initial_lora_a(const LoraSite& site, int rank, std::uint64_t seed) {
  const std::uint64_t name = hash_name(site.module);
  const std::size_t count = static_cast<std::size_t>(rank) * static_cast<std::size_t>(site.in_features);
  const float bound = static_cast<float>(1.0 / std::sqrt(static_cast<double>(site.in_features)));
  std::vector<float> values(count);
  for (std::size_t block = 0; block * 4 < count; ++block) {
    const auto words = philox4x32({static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                                   static_cast<std::uint32_t>(name), static_cast<std::uint32_t>(name >> 32)},
                                  seed);
    for (std::size_t i = 0; i < 4 && block * 4 + i < count; ++i) {
      values[block * 4 + i] = (2.0f * philox_unit(words[i]) - 1.0f) * bound;
    }
  }
  return values;
}

}  // namespace ht::model_spec
