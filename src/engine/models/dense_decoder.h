#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine/layers/decoder_block.h"
#include "engine/layers/head.h"
#include "engine/models/weight_source.h"
#include "model_spec/model_spec.h"

namespace ht::engine {

// A dense decoder-only transformer: transformers' LlamaForCausalLM (also SmolLM2), MistralForCausalLM (sliding window),
// Qwen2ForCausalLM (biases on q, k, v) and Qwen3ForCausalLM (per-head q and k norms). They differ in what ModelSpec
// says and share their tensor names.
struct DenseDecoder {
  const Device& device;
  model_spec::ModelSpec spec;
  at::Tensor embedding;  // (vocab, hidden)
  std::vector<DecoderBlock> blocks;
  at::Tensor final_norm;  // (hidden)
  Head head;              // a tied head shares the embedding's storage

  static DenseDecoder load(const model_spec::ModelSpec& spec, WeightSource& weights);
};

}  // namespace ht::engine
