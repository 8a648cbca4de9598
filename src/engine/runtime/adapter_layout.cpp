#include <ATen/ATen.h>

#include <cstring>
#include <vector>

#include "base/error.h"
#include "engine/runtime/adapter.h"

namespace ht::engine {

using model_spec::LoraConfig;
using model_spec::LoraSite;

namespace {

// Sites of a layer in lora_sites order: q k v | o | gate up | down. Returns the number of sites that share the input of
// the group starting at `site`.
std::size_t sites_sharing_input(std::size_t site, std::size_t num_sites) {
  if (site + 1 == num_sites) return 1;  // unembedding
  switch (site % 7) {
    case 0:
      return 3;
    case 4:
      return 2;
    default:
      return 1;
  }
}

}  // namespace

AdapterLayout::AdapterLayout(const model_spec::ModelSpec& spec, const LoraConfig& config)
    : config_(config), sites_(model_spec::lora_sites(spec)) {
  if (config.rank < 1 || config.rank > 256 || (config.rank & (config.rank - 1)) != 0) {
    throw user_error("LoRA rank " + std::to_string(config.rank) + ": allowed are the powers of two from 1 to 256");
  }
  if (sites_.size() != static_cast<std::size_t>(spec.num_hidden_layers) * 7 + 1) {
    throw server_error("unexpected list of LoRA sites");
  }
  padded_rank_ = (config.rank + 7) / 8 * 8;
  offsets_.resize(sites_.size());
  std::int64_t offset = 0;
  for (std::size_t first = 0; first < sites_.size();) {
    const std::size_t count = sites_sharing_input(first, sites_.size());
    if (model_spec::trains(config, sites_[first].group)) {
      for (std::size_t i = first; i < first + count; ++i) {
        offsets_[i].enabled = true;
        offsets_[i].a_offset = offset;
        offset += std::int64_t{padded_rank_} * sites_[i].in_features;
      }
      for (std::size_t i = first; i < first + count; ++i) {
        offsets_[i].b_offset = offset;
        offset += std::int64_t{padded_rank_} * sites_[i].out_features;
      }
    }
    first += count;
  }
  numel_ = offset;
  if (numel_ == 0) {
    throw user_error("an adapter must train at least one of attention, MLP and unembedding");
  }
}

Adapter Adapter::create(const model_spec::ModelSpec& spec, const LoraConfig& config, const Device& device) {
  auto layout = std::make_shared<const AdapterLayout>(spec, config);
  Adapter adapter;
  const at::Tensor initial = at::zeros({layout->numel()}, at::kFloat);
  float* flat = initial.data_ptr<float>();
  for (std::size_t i = 0; i < layout->sites().size(); ++i) {
    if (!layout->site(i).enabled) continue;
    // The real rank's rows come first: padding rows of A stay zero.
    const std::vector<float> a = model_spec::initial_lora_a(layout->sites()[i], config.rank, config.seed);
    std::memcpy(flat + layout->site(i).a_offset, a.data(), a.size() * sizeof(float));
  }
  adapter.weights = {std::move(layout), initial.to(device.torch_device())};
  adapter.grad = at::zeros_like(adapter.weights.flat);
  adapter.exp_avg = at::zeros_like(adapter.weights.flat);
  adapter.exp_avg_sq = at::zeros_like(adapter.weights.flat);
  return adapter;
}

void move_to(const Device& device, Adapter& adapter) {
  for (at::Tensor* buffer : {&adapter.weights.flat, &adapter.grad, &adapter.exp_avg, &adapter.exp_avg_sq}) {
    *buffer = buffer->to(device.torch_device());
  }
}

AdapterWeights freeze(const Adapter& adapter) {
  return {adapter.weights.layout, adapter.weights.flat.clone()};
}

}  // namespace ht::engine
