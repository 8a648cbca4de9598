#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "safetensors/safetensors.h"

namespace ht::engine {

// Reads a checkpoint's tensors as float32, by slices: at no time is more than one weight's file copy resident beside
// the result.
class WeightSource {
 public:
  using Progress = std::function<void(double fraction, const std::string& text)>;

  // `total_elements` of all weights that will be read, for the progress fraction.
  WeightSource(const std::filesystem::path& dir, std::int64_t total_elements, Progress progress);

  bool contains(const std::string& name) const { return checkpoint_.contains(name); }
  // A 1-D tensor of `size`, or the concatenation of several. Throws Error(user) naming a missing or misshapen tensor.
  at::Tensor vector(const std::vector<std::string>& names, const std::vector<std::int64_t>& sizes);
  // 2-D tensors (rows[i], columns) stacked into one (sum of rows, columns).
  at::Tensor matrix(const std::vector<std::string>& names, const std::vector<std::int64_t>& rows,
                    std::int64_t columns);

 private:
  void read(const std::string& name, const std::vector<std::int64_t>& shape, float* out);

  std::string dir_;
  safetensors::Checkpoint checkpoint_;
  std::int64_t total_elements_;
  std::int64_t done_elements_ = 0;
  Progress progress_;
};

}  // namespace ht::engine
