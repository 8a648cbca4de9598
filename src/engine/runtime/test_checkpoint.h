#pragma once

// For tests: a random tiny Llama checkpoint in a temporary directory.

#include <ATen/ATen.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "safetensors/safetensors.h"

namespace ht::engine {

// A directory that is removed at the end.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "ht_engine_XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Two layers, hidden 16, 2/1 heads of 8, MLP 24, vocabulary 31, untied.
inline void write_test_checkpoint(const std::filesystem::path& dir) {
  std::ofstream(dir / "config.json") << R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 31, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": false, "rope_theta": 10000.0})";
  at::Generator generator = at::globalContext().defaultGenerator(at::kCPU).clone();
  generator.set_current_seed(1);
  std::vector<at::Tensor> kept;
  std::vector<safetensors::TensorToWrite> tensors;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape) {
    kept.push_back(at::randn(shape, generator, at::kFloat) * 0.2);
    if (shape.size() == 1) kept.back().add_(1.0);
    tensors.push_back({name, safetensors::DType::f32, shape, kept.back().const_data_ptr()});
  };
  add("model.embed_tokens.weight", {31, 16});
  add("lm_head.weight", {31, 16});
  add("model.norm.weight", {16});
  for (int layer = 0; layer < 2; ++layer) {
    const std::string p = "model.layers." + std::to_string(layer) + ".";
    add(p + "input_layernorm.weight", {16});
    add(p + "post_attention_layernorm.weight", {16});
    add(p + "self_attn.q_proj.weight", {16, 16});
    add(p + "self_attn.k_proj.weight", {8, 16});
    add(p + "self_attn.v_proj.weight", {8, 16});
    add(p + "self_attn.o_proj.weight", {16, 16});
    add(p + "mlp.gate_proj.weight", {24, 16});
    add(p + "mlp.up_proj.weight", {24, 16});
    add(p + "mlp.down_proj.weight", {16, 24});
  }
  safetensors::write_file(dir / "model.safetensors", tensors);
}

}  // namespace ht::engine
