#include "model_spec/weight_names.h"

namespace ht::model_spec {

std::string weight_name(const ModelSpec& spec, std::string_view module) {
  if (module == "model.unembed_tokens") {
    return spec.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  }
  return std::string(module) + ".weight";
}

std::vector<BaseTensor> base_tensors(const ModelSpec& spec) {
  const std::int64_t hidden = spec.hidden_size;
  const std::int64_t inner = spec.intermediate_size;
  std::vector<BaseTensor> tensors;
  const auto linear = [&](const std::string& module, std::int64_t out, std::int64_t in, bool bias) {
    tensors.push_back({module + ".weight", {out, in}});
    if (bias) tensors.push_back({module + ".bias", {out}});
  };
  tensors.push_back({"model.embed_tokens.weight", {spec.vocab_size, hidden}});
  for (int layer = 0; layer < spec.num_hidden_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    tensors.push_back({prefix + "input_layernorm.weight", {hidden}});
    linear(prefix + "self_attn.q_proj", spec.q_size(), hidden, spec.attention_bias);
    linear(prefix + "self_attn.k_proj", spec.kv_size(), hidden, spec.attention_bias);
    linear(prefix + "self_attn.v_proj", spec.kv_size(), hidden, spec.attention_bias);
    if (spec.qk_norm) {
      tensors.push_back({prefix + "self_attn.q_norm.weight", {spec.head_dim}});
      tensors.push_back({prefix + "self_attn.k_norm.weight", {spec.head_dim}});
    }
    linear(prefix + "self_attn.o_proj", hidden, spec.q_size(), spec.attention_output_bias);
    tensors.push_back({prefix + "post_attention_layernorm.weight", {hidden}});
    linear(prefix + "mlp.gate_proj", inner, hidden, spec.mlp_bias);
    linear(prefix + "mlp.up_proj", inner, hidden, spec.mlp_bias);
    linear(prefix + "mlp.down_proj", hidden, inner, spec.mlp_bias);
  }
  tensors.push_back({"model.norm.weight", {hidden}});
  if (!spec.tie_word_embeddings) tensors.push_back({"lm_head.weight", {spec.vocab_size, hidden}});
  return tensors;
}

std::int64_t num_parameters(const ModelSpec& spec) {
  std::int64_t count = 0;
  for (const BaseTensor& tensor : base_tensors(spec)) {
    std::int64_t elements = 1;
    for (const std::int64_t n : tensor.shape) elements *= n;
    count += elements;
  }
  return count;
}

}  // namespace ht::model_spec
