#include "engine/models/dense_decoder.h"

#include <ATen/ATen.h>

#include <string>

namespace ht::engine {

namespace {

DecoderBlock load_block(const model_spec::ModelSpec& spec, WeightSource& weights, int layer) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  const std::string attn = prefix + "self_attn.", mlp = prefix + "mlp.";
  const std::int64_t hidden = spec.hidden_size, inner = spec.intermediate_size;
  const std::int64_t q = spec.q_size(), kv = spec.kv_size();
  DecoderBlock block;
  block.norm_eps = spec.rms_norm_eps;
  block.attention_norm = weights.vector({prefix + "input_layernorm.weight"}, {hidden});
  block.mlp_norm = weights.vector({prefix + "post_attention_layernorm.weight"}, {hidden});

  SelfAttention& attention = block.attention;
  attention.layer = layer;
  attention.shape = {spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim};
  attention.norm_eps = spec.rms_norm_eps;
  attention.window = spec.sliding_window[static_cast<std::size_t>(layer)];
  attention.qkv.weight = weights.matrix({attn + "q_proj.weight", attn + "k_proj.weight", attn + "v_proj.weight"},
                                        {q, kv, kv}, hidden);
  if (spec.attention_bias) {
    attention.qkv.bias =
        weights.vector({attn + "q_proj.bias", attn + "k_proj.bias", attn + "v_proj.bias"}, {q, kv, kv});
  }
  attention.o.weight = weights.matrix({attn + "o_proj.weight"}, {hidden}, q);
  if (spec.attention_output_bias) attention.o.bias = weights.vector({attn + "o_proj.bias"}, {hidden});
  if (spec.qk_norm) {
    attention.q_norm = weights.vector({attn + "q_norm.weight"}, {spec.head_dim});
    attention.k_norm = weights.vector({attn + "k_norm.weight"}, {spec.head_dim});
  }

  block.mlp.layer = layer;
  block.mlp.gate_up.weight = weights.matrix({mlp + "gate_proj.weight", mlp + "up_proj.weight"}, {inner, inner}, hidden);
  block.mlp.down.weight = weights.matrix({mlp + "down_proj.weight"}, {hidden}, inner);
  if (spec.mlp_bias) {
    block.mlp.gate_up.bias = weights.vector({mlp + "gate_proj.bias", mlp + "up_proj.bias"}, {inner, inner});
    block.mlp.down.bias = weights.vector({mlp + "down_proj.bias"}, {hidden});
  }
  for (BaseLinear* linear : {&attention.qkv, &attention.o, &block.mlp.gate_up, &block.mlp.down}) {
    linear->packed = pack_weight_16_bits(linear->weight);
  }
  return block;
}

}  // namespace

DenseDecoder DenseDecoder::load(const model_spec::ModelSpec& spec, WeightSource& weights) {
  DenseDecoder model;
  model.spec = spec;
  model.embedding = weights.matrix({"model.embed_tokens.weight"}, {spec.vocab_size}, spec.hidden_size);
  for (int layer = 0; layer < spec.num_hidden_layers; ++layer) model.blocks.push_back(load_block(spec, weights, layer));
  model.final_norm = weights.vector({"model.norm.weight"}, {spec.hidden_size});
  model.head.unembedding.weight = spec.tie_word_embeddings
                                      ? model.embedding
                                      : weights.matrix({"lm_head.weight"}, {spec.vocab_size}, spec.hidden_size);
  model.head.unembedding.packed = pack_weight_16_bits(model.head.unembedding.weight);
  return model;
}

}  // namespace ht::engine
