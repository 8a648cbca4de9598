#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "engine/device/cpu.h"
#include "model_spec/lora_sites.h"
#include "model_spec/model_spec.h"

namespace ht::engine {

// Where each site's factors lie in an adapter's flat float32 buffer. Ranks are stored padded to a multiple of 8 with
// zeros (padding rows of A and columns of B stay zero). The A's of sites that share an input (q, k, v; gate, up) are
// adjacent, so that one GEMM serves them.
class AdapterLayout {
 public:
  struct Site {
    bool enabled = false;
    std::int64_t a_offset = 0;  // (padded_rank, in_features) row-major
    std::int64_t b_offset = 0;  // (out_features, padded_rank) row-major
  };

  AdapterLayout(const model_spec::ModelSpec& spec, const model_spec::LoraConfig& config);

  const model_spec::LoraConfig& config() const { return config_; }
  int rank() const { return config_.rank; }
  int padded_rank() const { return padded_rank_; }
  double scale() const { return model_spec::kLoraAlpha / config_.rank; }
  std::int64_t numel() const { return numel_; }
  const std::vector<model_spec::LoraSite>& sites() const { return sites_; }  // model_spec::lora_sites order
  const Site& site(std::size_t index) const { return offsets_[index]; }

 private:
  model_spec::LoraConfig config_;
  int padded_rank_ = 0;
  std::int64_t numel_ = 0;
  std::vector<model_spec::LoraSite> sites_;
  std::vector<Site> offsets_;
};

// An immutable set of adapter weights: what a sampler version is, and what a forward pass reads.
struct AdapterWeights {
  std::shared_ptr<const AdapterLayout> layout;
  at::Tensor flat;  // float32 [layout->numel()], on the device or in host memory
};

// An adapter in training: master weights, accumulated gradient and Adam moments, each one flat float32 buffer on
// the device.
struct Adapter {
  AdapterWeights weights;
  at::Tensor grad;
  at::Tensor exp_avg;
  at::Tensor exp_avg_sq;
  std::int64_t step = 0;

  // Fresh: A by model_spec::initial_lora_a, B = 0.
  static Adapter create(const model_spec::ModelSpec& spec, const model_spec::LoraConfig& config,
                        const Device& device = cpu_device());
};

// Moves its buffers onto the device, where they are not there already.
void move_to(const Device& device, Adapter& adapter);

// A copy that later optimizer steps do not touch.
AdapterWeights freeze(const Adapter& adapter);

// The files of an adapter. `base_model` is written as base_model_name_or_path.
//   adapter_config.json, adapter_model.safetensors: PEFT layout, names and shapes of model_spec::LoraSite::module, the
//   real (unpadded) rank; optimizer.safetensors: moments in the same names, and the step.
// Return bytes written. Throw Error.
std::uint64_t save_adapter_weights(const AdapterWeights& weights, const std::string& base_model,
                                   const std::filesystem::path& dir);
std::uint64_t save_optimizer(const Adapter& adapter, const std::filesystem::path& dir);
// Reads adapter_config.json's LoRA shape.
model_spec::LoraConfig read_lora_config(const std::filesystem::path& dir);
// Loads into host memory; throws Error(user) naming the first tensor that is missing or of another shape.
AdapterWeights load_adapter_weights(const model_spec::ModelSpec& spec, const std::filesystem::path& dir);
void load_optimizer(Adapter& adapter, const std::filesystem::path& dir);
// A whole adapter for recovery: weights, moments, pending gradient, step; one file, bit-exact.
void save_adapter_state(const Adapter& adapter, const std::filesystem::path& file);
Adapter load_adapter_state(const model_spec::ModelSpec& spec, const std::filesystem::path& file,
                           const Device& device = cpu_device());

}  // namespace ht::engine
