#pragma once

// What a checkpoint directory's config.json says, in the field's terms and without torch. One ModelSpec drives weight
// loading, LoRA placement, memory planning, validation and the layers' shapes.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace ht::model_spec {

enum class RopeType { standard, linear, dynamic, yarn, llama3, longrope };

// Rotary embedding; the scaled forms mirror transformers/modeling_rope_utils.py.
struct RopeSpec {
  RopeType type = RopeType::standard;
  double theta = 10000.0;
  double factor = 1.0;                       // linear, dynamic, yarn, llama3
  int original_max_position_embeddings = 0;  // dynamic, yarn, llama3, longrope
  double low_freq_factor = 1.0;              // llama3
  double high_freq_factor = 4.0;             // llama3
  double beta_fast = 32.0;                   // yarn
  double beta_slow = 1.0;                    // yarn
  std::optional<double> attention_factor;    // yarn, longrope
  std::optional<double> mscale;              // yarn
  std::optional<double> mscale_all_dim;      // yarn
  bool truncate = true;                      // yarn: round the correction range
  std::vector<double> short_factor;          // longrope
  std::vector<double> long_factor;           // longrope
};

enum class Family { llama, mistral, qwen2, qwen3 };

struct ModelSpec {
  Family family = Family::llama;
  std::string architecture;  // "LlamaForCausalLM"
  std::string model_type;    // "llama"
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_hidden_layers = 0;
  int num_attention_heads = 0;
  int num_key_value_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  int max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  bool attention_bias = false;         // q, k, v
  bool attention_output_bias = false;  // o
  bool mlp_bias = false;
  bool qk_norm = false;             // per-head RMSNorm on q and k (Qwen3)
  std::vector<int> sliding_window;  // [num_hidden_layers], 0 = full attention
  RopeSpec rope;
  std::vector<std::int32_t> eos_token_ids;  // generation_config.json, else config.json
  std::int32_t bos_token_id = -1;

  int q_size() const { return num_attention_heads * head_dim; }
  int kv_size() const { return num_key_value_heads * head_dim; }
};

// Reads DIR/config.json (and generation_config.json). Throws Error(user) naming the field, its value and what is
// supported for an unknown architecture or an unsupported option.
ModelSpec read_model_spec(const std::filesystem::path& dir);

// Number of base parameters (a tied head counts once).
std::int64_t num_parameters(const ModelSpec& spec);

}  // namespace ht::model_spec
