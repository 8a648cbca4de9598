#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "engine/device/device.h"
#include "engine/layers/recompute.h"
#include "model_spec/model_spec.h"

namespace ht::engine {

struct EngineOptions {
  int threads = 0;  // 0: all cores
  Recompute recompute = Recompute::none;
  const Device* device = nullptr;  // nullptr: cpu_device()
};

// The frozen base: weights of every block and the head, shared by all adapters, the trainer and the sampler.
class BaseModel {
 public:
  // Maps the checkpoint, converts to the device's compute dtype and fuses q/k/v and gate/up. `progress` gets a
  // fraction 0…1. Throws Error(user) naming a missing or misshapen tensor.
  static std::unique_ptr<BaseModel> load(
      const std::filesystem::path& dir, const EngineOptions& options,
      const std::function<void(double fraction, const std::string& text)>& progress = {});
  ~BaseModel();

  const model_spec::ModelSpec& spec() const;
  const EngineOptions& options() const;
  const Device& device() const;
  // The linears also lie in memory in the checkpoint's 16 bits, for products with few rows.
  bool has_16_bit_copy() const;

  // The blocks and the head; models/ and layers/ define them.
  struct Impl;  // runtime/base_model_impl.h
  const Impl& impl() const { return *impl_; }

 private:
  explicit BaseModel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace ht::engine
