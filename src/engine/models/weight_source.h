#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "engine/device/device.h"
#include "model_spec/weight_names.h"
#include "safetensors/safetensors.h"

namespace ht::engine {

// Reads a checkpoint's tensors onto a device in its compute dtype, by slices: at no time is more than one slice, or one
// weight's file copy, resident beside the result.
class WeightSource {
 public:
  using Progress = std::function<void(double fraction, const std::string& text)>;

  // `total_elements` of all weights that will be read, for the progress fraction.
  WeightSource(const Device& device, const std::filesystem::path& dir, std::int64_t total_elements, Progress progress);

  // A vector or matrix, or several stacked along their first dimension. Throws Error(user) naming a missing or
  // misshapen tensor.
  at::Tensor read(const std::vector<model_spec::BaseTensor>& tensors);

  const Device& device() const { return device_; }

 private:
  void read_into(const model_spec::BaseTensor& tensor, const at::Tensor& out);

  const Device& device_;
  std::string dir_;
  safetensors::Checkpoint checkpoint_;
  std::int64_t total_elements_;
  std::int64_t done_elements_ = 0;
  Progress progress_;
};

}  // namespace ht::engine
