#include "model_spec/model_spec.h"

#include <algorithm>
#include <climits>
#include <fstream>
#include <sstream>

#include "base/error.h"
#include "model_spec/config_fields.h"
#include "model_spec/rope_config.h"

namespace ht::model_spec {
namespace {

namespace fs = std::filesystem;
namespace json = boost::json;

// Defaults of the family's config class in transformers (configuration_llama.py and so on): what an absent key means.
struct FamilyRow {
  Family family;
  std::string_view architecture;
  std::string_view model_type;
  int vocab_size;
  int intermediate_size;
  int num_key_value_heads;  // 0: as many as attention heads
  int head_dim;             // 0: hidden_size / num_attention_heads
  int max_position_embeddings;
  int bos_token_id;  // -1: none
  int eos_token_id;  // -1: none
};
constexpr FamilyRow kFamilies[] = {
    {Family::llama, "LlamaForCausalLM", "llama", 32000, 11008, 0, 0, 2048, 1, 2},
    {Family::mistral, "MistralForCausalLM", "mistral", 32000, 14336, 8, 0, 131072, 1, 2},
    {Family::qwen2, "Qwen2ForCausalLM", "qwen2", 151936, 22016, 32, 0, 32768, -1, -1},
    {Family::qwen3, "Qwen3ForCausalLM", "qwen3", 151936, 22016, 32, 128, 32768, -1, -1},
};
constexpr std::string_view kSupported =
    "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";

json::object read_object(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw user_error("cannot read " + file.string());
  std::ostringstream text;
  text << stream.rdbuf();
  json::error_code error;
  json::value value = json::parse(text.str(), error);
  if (error || !value.is_object()) throw user_error(file.string() + " holds no JSON object");
  return std::move(value.get_object());
}

const FamilyRow& find_family(const ConfigFields& config) {
  std::vector<std::string> names = config.texts("architectures");
  const std::string model_type = config.text("model_type", "");
  const auto row = std::find_if(std::begin(kFamilies), std::end(kFamilies), [&](const FamilyRow& r) {
    return names.empty() ? r.model_type == model_type : r.architecture == names.front();
  });
  if (row == std::end(kFamilies)) {
    config.refuse(names.empty() ? "model_type" : "architectures", std::string(kSupported));
  }
  if (!model_type.empty() && model_type != row->model_type) {
    config.refuse("model_type", "but architectures says " + std::string(row->architecture));
  }
  return *row;
}

// The window of each layer, 0 = full attention.
std::vector<int> read_sliding_window(const ConfigFields& config, Family family, int num_layers) {
  std::vector<int> windows(static_cast<std::size_t>(num_layers), 0);
  if (family == Family::llama) return windows;  // LlamaModel has no window

  // An absent key is the class's default of 4096, null is none.
  const int window = config.has("sliding_window") && config.find("sliding_window") == nullptr
                         ? 0
                         : static_cast<int>(config.integer("sliding_window", 4096, 1, INT_MAX));
  if (family == Family::mistral) {
    std::fill(windows.begin(), windows.end(), window);
    return windows;
  }
  const bool slides = config.boolean("use_sliding_window", false) && window > 0;
  const std::vector<std::string> types = config.texts("layer_types");
  if (types.empty()) {
    const std::int64_t first = config.integer("max_window_layers", 28, 0, INT_MAX);
    for (std::int64_t i = first; slides && i < num_layers; ++i) windows[static_cast<std::size_t>(i)] = window;
    return windows;
  }
  if (types.size() != windows.size()) {
    config.refuse("layer_types", "it must have num_hidden_layers = " + std::to_string(num_layers) + " entries");
  }
  for (std::size_t i = 0; i < types.size(); ++i) {
    if (types[i] == "sliding_attention") {
      if (!slides) config.refuse("layer_types", "sliding_attention needs use_sliding_window and sliding_window");
      windows[i] = window;
    } else if (types[i] != "full_attention") {
      config.refuse("layer_types", "supported are full_attention and sliding_attention");
    }
  }
  return windows;
}

std::vector<std::int32_t> read_token_ids(const ConfigFields& fields, std::string_view key) {
  const json::value* value = fields.find(key);
  if (value == nullptr) return {};
  const auto one = [&](const json::value& item) {
    if (!item.is_int64() || item.get_int64() < 0 || item.get_int64() > INT_MAX) {
      fields.refuse(key, "it must be a token id or a list of token ids");
    }
    return static_cast<std::int32_t>(item.get_int64());
  };
  if (!value->is_array()) return {one(*value)};
  std::vector<std::int32_t> ids;
  for (const json::value& item : value->get_array()) ids.push_back(one(item));
  return ids;
}

std::vector<std::int32_t> read_eos(const fs::path& dir, const ConfigFields& config, const FamilyRow& row) {
  const fs::path generation = dir / "generation_config.json";
  if (fs::exists(generation)) {
    const json::object object = read_object(generation);
    const ConfigFields fields(object, generation.string());
    if (fields.find("eos_token_id") != nullptr) return read_token_ids(fields, "eos_token_id");
  }
  if (!config.has("eos_token_id") && row.eos_token_id >= 0) return {row.eos_token_id};
  return read_token_ids(config, "eos_token_id");
}

void read_sizes(const ConfigFields& config, const FamilyRow& row, ModelSpec& spec) {
  constexpr std::int64_t kMaxWidth = 1 << 20;
  const auto size = [&](std::string_view key, int fallback, std::int64_t most) {
    return static_cast<int>(config.integer(key, fallback, 1, most));
  };
  spec.vocab_size = size("vocab_size", row.vocab_size, 1 << 26);
  spec.hidden_size = size("hidden_size", 4096, kMaxWidth);
  spec.intermediate_size = size("intermediate_size", row.intermediate_size, kMaxWidth);
  spec.num_hidden_layers = size("num_hidden_layers", 32, 4096);
  spec.num_attention_heads = size("num_attention_heads", 32, 4096);
  const bool kv_absent = !config.has("num_key_value_heads") && row.num_key_value_heads > 0;
  spec.num_key_value_heads =
      size("num_key_value_heads", kv_absent ? row.num_key_value_heads : spec.num_attention_heads, 4096);
  if (spec.num_attention_heads % spec.num_key_value_heads != 0) {
    config.refuse("num_key_value_heads",
                  "it must divide num_attention_heads = " + std::to_string(spec.num_attention_heads));
  }
  const bool head_dim_given = config.find("head_dim") != nullptr || row.head_dim > 0;
  if (!head_dim_given && spec.hidden_size % spec.num_attention_heads != 0) {
    config.refuse("hidden_size", "it must be a multiple of num_attention_heads = " +
                                     std::to_string(spec.num_attention_heads) + " when head_dim is not given");
  }
  spec.head_dim = size("head_dim", row.head_dim > 0 ? row.head_dim : spec.hidden_size / spec.num_attention_heads, 8192);
  if (spec.head_dim % 2 != 0) config.refuse("head_dim", "it must be even, it is " + std::to_string(spec.head_dim));
  spec.max_position_embeddings = size("max_position_embeddings", row.max_position_embeddings, INT_MAX);
}

}  // namespace

ModelSpec read_model_spec(const fs::path& dir) {
  const fs::path file = dir / "config.json";
  if (!fs::exists(file)) throw user_error(dir.string() + " is no model directory: it has no config.json");
  const json::object object = read_object(file);
  const ConfigFields config(object, file.string());
  const FamilyRow& row = find_family(config);

  ModelSpec spec;
  spec.family = row.family;
  spec.architecture = row.architecture;
  spec.model_type = row.model_type;
  read_sizes(config, row, spec);

  if (const std::string act = config.text("hidden_act", "silu"); act != "silu" && act != "swish") {
    config.refuse("hidden_act", "supported is silu");
  }
  if (config.find("quantization_config") != nullptr) {
    config.refuse("quantization_config", "quantized weights are not supported");
  }
  spec.rms_norm_eps = config.number("rms_norm_eps", 1e-6);
  if (spec.rms_norm_eps < 0.0) config.refuse("rms_norm_eps", "it must not be negative");
  spec.tie_word_embeddings = config.boolean("tie_word_embeddings", false);

  // LlamaAttention and Qwen3Attention put attention_bias on all four; Qwen2Attention has it on q, k, v always.
  const bool bias = config.boolean("attention_bias", false);
  const bool configurable = row.family == Family::llama || row.family == Family::qwen3;
  spec.attention_bias = row.family == Family::qwen2 || (configurable && bias);
  spec.attention_output_bias = configurable && bias;
  spec.mlp_bias = row.family == Family::llama && config.boolean("mlp_bias", false);
  spec.qk_norm = row.family == Family::qwen3;

  spec.sliding_window = read_sliding_window(config, row.family, spec.num_hidden_layers);
  spec.rope = read_rope(config, spec.head_dim, spec.max_position_embeddings);
  spec.eos_token_ids = read_eos(dir, config, row);
  if (!config.has("bos_token_id")) {
    spec.bos_token_id = row.bos_token_id;
  } else if (const auto bos = read_token_ids(config, "bos_token_id"); !bos.empty()) {
    spec.bos_token_id = bos.front();
  }
  return spec;
}

}  // namespace ht::model_spec
