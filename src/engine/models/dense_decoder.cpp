#include "engine/models/dense_decoder.h"

#include <ATen/ATen.h>

#include <vector>

#include "model_spec/weight_names.h"

namespace ht::engine {

namespace {

// One linear, or several that share an input, stacked.
BaseLinear load_linear(WeightSource& weights, const std::vector<model_spec::LinearTensors>& parts) {
  std::vector<model_spec::BaseTensor> matrices, biases;
  for (const model_spec::LinearTensors& part : parts) {
    matrices.push_back(part.weight);
    if (part.bias) biases.push_back(*part.bias);
  }
  BaseLinear linear;
  linear.weight = weights.read(matrices);
  if (!biases.empty()) linear.bias = weights.read(biases);
  if (weights.device().has_decode_kernels()) linear.packed = pack_weight_16_bits(linear.weight);
  return linear;
}

DecoderBlock load_block(const model_spec::ModelSpec& spec, const model_spec::LayerTensors& tensors,
                        WeightSource& weights, int layer) {
  DecoderBlock block;
  block.norm_eps = spec.rms_norm_eps;
  block.attention_norm = weights.read({tensors.attention_norm});
  block.mlp_norm = weights.read({tensors.mlp_norm});

  SelfAttention& attention = block.attention;
  attention.layer = layer;
  attention.shape = {spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim};
  attention.norm_eps = spec.rms_norm_eps;
  attention.window = spec.sliding_window[static_cast<std::size_t>(layer)];
  attention.qkv = load_linear(weights, {tensors.q, tensors.k, tensors.v});
  attention.o = load_linear(weights, {tensors.o});
  if (tensors.q_norm) attention.q_norm = weights.read({*tensors.q_norm});
  if (tensors.k_norm) attention.k_norm = weights.read({*tensors.k_norm});

  block.mlp.layer = layer;
  block.mlp.gate_up = load_linear(weights, {tensors.gate, tensors.up});
  block.mlp.down = load_linear(weights, {tensors.down});
  return block;
}

}  // namespace

DenseDecoder DenseDecoder::load(const model_spec::ModelSpec& spec, WeightSource& weights) {
  const model_spec::BaseTensors tensors = model_spec::base_tensors(spec);
  DenseDecoder model{weights.device(), spec, {}, {}, {}, {}};
  model.embedding = weights.read({tensors.embedding});
  for (int layer = 0; layer < spec.num_hidden_layers; ++layer) {
    model.blocks.push_back(load_block(spec, tensors.layers[static_cast<std::size_t>(layer)], weights, layer));
  }
  model.final_norm = weights.read({tensors.final_norm});
  model.head.unembedding.weight = tensors.unembedding ? weights.read({*tensors.unembedding}) : model.embedding;
  if (model.device.has_decode_kernels()) {
    model.head.unembedding.packed = pack_weight_16_bits(model.head.unembedding.weight);
  }
  return model;
}

}  // namespace ht::engine
