#pragma once

// Names and shapes of a base model's tensors in a Hugging Face checkpoint.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model_spec/model_spec.h"

namespace ht::model_spec {

struct BaseTensor {
  std::string name;
  std::vector<std::int64_t> shape;
};

// Every tensor that the forward pass reads, in its order; linears are (out, in). A tied head is the input embedding and
// has no entry of its own, whatever else the files hold.
std::vector<BaseTensor> base_tensors(const ModelSpec& spec);

// The weight of a LoRA site's module: "<module>.weight"; the unembedding's is "lm_head.weight", or the input embedding
// when it is tied.
std::string weight_name(const ModelSpec& spec, std::string_view module);

}  // namespace ht::model_spec
