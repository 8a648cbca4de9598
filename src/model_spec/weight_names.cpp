#include "model_spec/weight_names.h"

namespace ht::model_spec {

namespace {

LinearTensors linear(const std::string& module, std::int64_t out, std::int64_t in, bool bias) {
  LinearTensors tensors{{module + ".weight", {out, in}}, std::nullopt};
  if (bias) tensors.bias = BaseTensor{module + ".bias", {out}};
  return tensors;
}

LayerTensors layer_tensors(const ModelSpec& spec, int layer) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  const std::string attn = prefix + "self_attn.", mlp = prefix + "mlp.";
  const std::int64_t hidden = spec.hidden_size, inner = spec.intermediate_size;
  LayerTensors tensors;
  tensors.attention_norm = {prefix + "input_layernorm.weight", {hidden}};
  tensors.mlp_norm = {prefix + "post_attention_layernorm.weight", {hidden}};
  tensors.q = linear(attn + "q_proj", spec.q_size(), hidden, spec.attention_bias);
  tensors.k = linear(attn + "k_proj", spec.kv_size(), hidden, spec.attention_bias);
  tensors.v = linear(attn + "v_proj", spec.kv_size(), hidden, spec.attention_bias);
  tensors.o = linear(attn + "o_proj", hidden, spec.q_size(), spec.attention_output_bias);
  tensors.gate = linear(mlp + "gate_proj", inner, hidden, spec.mlp_bias);
  tensors.up = linear(mlp + "up_proj", inner, hidden, spec.mlp_bias);
  tensors.down = linear(mlp + "down_proj", hidden, inner, spec.mlp_bias);
  if (spec.qk_norm) {
    tensors.q_norm = BaseTensor{attn + "q_norm.weight", {spec.head_dim}};
    tensors.k_norm = BaseTensor{attn + "k_norm.weight", {spec.head_dim}};
  }
  return tensors;
}

}  // namespace

BaseTensors base_tensors(const ModelSpec& spec) {
  const std::int64_t hidden = spec.hidden_size, vocab = spec.vocab_size;
  BaseTensors tensors;
  tensors.embedding = {"model.embed_tokens.weight", {vocab, hidden}};
  for (int layer = 0; layer < spec.num_hidden_layers; ++layer) tensors.layers.push_back(layer_tensors(spec, layer));
  tensors.final_norm = {"model.norm.weight", {hidden}};
  if (!spec.tie_word_embeddings) tensors.unembedding = BaseTensor{"lm_head.weight", {vocab, hidden}};
  return tensors;
}

std::vector<BaseTensor> list_tensors(const BaseTensors& tensors) {
  std::vector<BaseTensor> list = {tensors.embedding};
  for (const LayerTensors& layer : tensors.layers) {
    list.push_back(layer.attention_norm);
    for (const LinearTensors* linear : {&layer.q, &layer.k, &layer.v, &layer.o}) {
      list.push_back(linear->weight);
      if (linear->bias) list.push_back(*linear->bias);
    }
    if (layer.q_norm) list.push_back(*layer.q_norm);
    if (layer.k_norm) list.push_back(*layer.k_norm);
    list.push_back(layer.mlp_norm);
    for (const LinearTensors* linear : {&layer.gate, &layer.up, &layer.down}) {
      list.push_back(linear->weight);
      if (linear->bias) list.push_back(*linear->bias);
    }
  }
  list.push_back(tensors.final_norm);
  if (tensors.unembedding) list.push_back(*tensors.unembedding);
  return list;
}

std::int64_t num_parameters(const ModelSpec& spec) {
  std::int64_t count = 0;
  for (const BaseTensor& tensor : list_tensors(base_tensors(spec))) {
    std::int64_t elements = 1;
    for (const std::int64_t n : tensor.shape) elements *= n;
    count += elements;
  }
  return count;
}

}  // namespace ht::model_spec
