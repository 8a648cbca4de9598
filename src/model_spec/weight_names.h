#pragma once

// Names and shapes of a base model's tensors in a Hugging Face checkpoint.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model_spec/model_spec.h"

namespace ht::model_spec {

struct BaseTensor {
  std::string name;
  std::vector<std::int64_t> shape;
};

struct LinearTensors {
  BaseTensor weight;  // (out, in)
  std::optional<BaseTensor> bias;
};

struct LayerTensors {
  BaseTensor attention_norm, mlp_norm;
  LinearTensors q, k, v, o, gate, up, down;
  std::optional<BaseTensor> q_norm, k_norm;
};

// Every tensor that the forward pass reads.
struct BaseTensors {
  BaseTensor embedding;
  std::vector<LayerTensors> layers;
  BaseTensor final_norm;
  std::optional<BaseTensor> unembedding;  // a tied head is the input embedding, whatever else the files hold
};

BaseTensors base_tensors(const ModelSpec& spec);

// All of them, in the forward pass's order.
std::vector<BaseTensor> list_tensors(const BaseTensors& tensors);

}  // namespace ht::model_spec
