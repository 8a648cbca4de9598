#include "model_spec/model_spec.h"

#include <gmock/gmock.h>

#include <fstream>

#include "base/error.h"
#include "model_spec/weight_names.h"

namespace ht::model_spec {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

class ModelSpecTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "ht_model_spec_XXXXXX").string();
    dir = ::mkdtemp(pattern.data());
  }
  void TearDown() override { fs::remove_all(dir); }

  void write(const std::string& name, const std::string& text) { std::ofstream(dir / name) << text; }
  // `body`: the fields of config.json beside the architecture.
  ModelSpec read(const std::string& architecture, const std::string& body = "") {
    write("config.json", "{\"architectures\": [\"" + architecture + "\"]" + (body.empty() ? "" : ", " + body) + "}");
    return read_model_spec(dir);
  }
  std::string refusal(const std::string& architecture, const std::string& body = "") {
    try {
      read(architecture, body);
    } catch (const Error& error) {
      EXPECT_EQ(error.category(), ErrorCategory::user);
      return error.what();
    }
    return "accepted";
  }

  fs::path dir;
};

// The published config.json of Llama-3.1-8B-Instruct, shortened to what a spec takes from it.
TEST_F(ModelSpecTest, Llama31) {
  write("config.json", R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": false, "vocab_size": 128256})");
  const ModelSpec spec = read_model_spec(dir);
  EXPECT_EQ(spec.family, Family::llama);
  EXPECT_EQ(spec.head_dim, 128);
  EXPECT_EQ(spec.rms_norm_eps, 1e-5);
  EXPECT_EQ(spec.rope.type, RopeType::llama3);
  EXPECT_EQ(spec.rope.theta, 500000);
  EXPECT_EQ(spec.rope.factor, 8);
  EXPECT_EQ(spec.rope.original_max_position_embeddings, 8192);
  EXPECT_THAT(spec.eos_token_ids, ElementsAre(128001, 128008, 128009));
  EXPECT_EQ(spec.bos_token_id, 128000);
  EXPECT_FALSE(spec.attention_bias);
  EXPECT_EQ(num_parameters(spec), 8'030'261'248);
  EXPECT_EQ(spec.sliding_window, std::vector<int>(32, 0));
}

TEST_F(ModelSpecTest, Qwen3KeepsItsOwnHeadDim) {
  const ModelSpec spec = read("Qwen3ForCausalLM", R"("hidden_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 8, "intermediate_size": 3072, "num_hidden_layers": 28, "tie_word_embeddings": true,
    "rope_theta": 1000000, "rope_scaling": null, "sliding_window": null, "max_window_layers": 28)");
  EXPECT_EQ(spec.head_dim, 128);
  EXPECT_EQ(spec.q_size(), 2048);
  EXPECT_TRUE(spec.qk_norm);
  EXPECT_EQ(spec.rope.theta, 1e6);
  EXPECT_EQ(spec.bos_token_id, -1);
  EXPECT_THAT(spec.eos_token_ids, ElementsAre());
  EXPECT_EQ(num_parameters(spec), 596'049'920);  // Qwen3-0.6B
}

TEST_F(ModelSpecTest, AbsentKeysAreTheClassDefaults) {
  const ModelSpec llama = read("LlamaForCausalLM");
  EXPECT_EQ(llama.num_key_value_heads, 32);
  EXPECT_EQ(llama.max_position_embeddings, 2048);
  EXPECT_EQ(num_parameters(llama), 6'738'415'616);
  EXPECT_THAT(llama.eos_token_ids, ElementsAre(2));
  EXPECT_EQ(llama.bos_token_id, 1);
  const ModelSpec mistral = read("MistralForCausalLM");
  EXPECT_EQ(mistral.num_key_value_heads, 8);
  EXPECT_EQ(mistral.sliding_window, std::vector<int>(32, 4096));
  EXPECT_EQ(num_parameters(mistral), 7'241'732'096);  // Mistral-7B
  EXPECT_EQ(read("MistralForCausalLM", R"("num_key_value_heads": null)").num_key_value_heads, 32);
  EXPECT_EQ(read("Qwen2ForCausalLM").head_dim, 128);
}

TEST_F(ModelSpecTest, ArchitectureOrModelTypeNamesTheFamily) {
  write("config.json", R"({"model_type": "mistral"})");
  EXPECT_EQ(read_model_spec(dir).architecture, "MistralForCausalLM");
  EXPECT_THAT(refusal("GPT2LMHeadModel"),
              testing::AllOf(HasSubstr("GPT2LMHeadModel"), HasSubstr("supported are Llama")));
  EXPECT_THAT(refusal("LlamaForCausalLM", R"("model_type": "qwen2")"),
              HasSubstr("architectures says LlamaForCausalLM"));
  write("config.json", R"({"model_type": "gemma"})");
  EXPECT_THROW(read_model_spec(dir), Error);
  write("config.json", "{}");
  EXPECT_THROW(read_model_spec(dir), Error);
  write("config.json", "[1");
  EXPECT_THROW(read_model_spec(dir), Error);
  fs::remove(dir / "config.json");
  EXPECT_THROW(read_model_spec(dir), Error);
}

TEST_F(ModelSpecTest, BiasesFollowTheFamily) {
  const auto biases = [&](const std::string& architecture, const std::string& body = "") {
    const ModelSpec s = read(architecture, body);
    return std::vector<bool>{s.attention_bias, s.attention_output_bias, s.mlp_bias};
  };
  const std::string all = R"("attention_bias": true, "mlp_bias": true)";
  EXPECT_THAT(biases("LlamaForCausalLM"), ElementsAre(false, false, false));
  EXPECT_THAT(biases("LlamaForCausalLM", all), ElementsAre(true, true, true));
  EXPECT_THAT(biases("MistralForCausalLM", all), ElementsAre(false, false, false));
  EXPECT_THAT(biases("Qwen2ForCausalLM"), ElementsAre(true, false, false));
  EXPECT_THAT(biases("Qwen3ForCausalLM", all), ElementsAre(true, true, false));
}

TEST_F(ModelSpecTest, SlidingWindowFollowsTheFamily) {
  const auto windows = [&](const std::string& architecture, const std::string& body) {
    return read(architecture, "\"num_hidden_layers\": 4, " + body).sliding_window;
  };
  EXPECT_THAT(windows("LlamaForCausalLM", R"("sliding_window": 8)"), ElementsAre(0, 0, 0, 0));
  EXPECT_THAT(windows("MistralForCausalLM", R"("sliding_window": 8)"), ElementsAre(8, 8, 8, 8));
  EXPECT_THAT(windows("MistralForCausalLM", R"("sliding_window": null)"), ElementsAre(0, 0, 0, 0));
  EXPECT_THAT(windows("Qwen2ForCausalLM", R"("sliding_window": 8, "max_window_layers": 2)"), ElementsAre(0, 0, 0, 0));
  EXPECT_THAT(windows("Qwen2ForCausalLM", R"("use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2)"),
              ElementsAre(0, 0, 8, 8));
  EXPECT_THAT(windows("Qwen3ForCausalLM", R"("use_sliding_window": true, "max_window_layers": 0)"),
              ElementsAre(4096, 4096, 4096, 4096));
  EXPECT_THAT(windows("Qwen3ForCausalLM", R"("use_sliding_window": true, "sliding_window": 16, "layer_types":
                ["sliding_attention", "full_attention", "full_attention", "sliding_attention"])"),
              ElementsAre(16, 0, 0, 16));
  EXPECT_THAT(refusal("Qwen3ForCausalLM", R"("num_hidden_layers": 1, "layer_types": ["sliding_attention"])"),
              HasSubstr("use_sliding_window"));
  EXPECT_THAT(refusal("Qwen3ForCausalLM", R"("num_hidden_layers": 2, "layer_types": ["full_attention"])"),
              HasSubstr("2 entries"));
  EXPECT_THAT(refusal("Qwen3ForCausalLM", R"("num_hidden_layers": 1, "layer_types": ["linear_attention"])"),
              HasSubstr("linear_attention"));
}

TEST_F(ModelSpecTest, RopeIsReadInEverySpelling) {
  const auto rope = [&](const std::string& body) {
    return read("LlamaForCausalLM", "\"hidden_size\": 256, \"max_position_embeddings\": 4096, " + body).rope;
  };
  EXPECT_EQ(rope(R"("rope_scaling": {"type": "linear", "factor": 2.5})").type, RopeType::linear);
  EXPECT_EQ(rope(R"("rope_scaling": {"type": "linear", "factor": 2.5})").factor, 2.5);
  const RopeSpec newer = rope(R"("rope_parameters": {"rope_type": "dynamic", "rope_theta": 777, "factor": 2})");
  EXPECT_EQ(newer.type, RopeType::dynamic);
  EXPECT_EQ(newer.theta, 777);
  EXPECT_EQ(newer.original_max_position_embeddings, 4096);
  EXPECT_EQ(rope(R"("rope_theta": 5, "rope_parameters": {"rope_type": "default"})").theta, 5);
  EXPECT_EQ(rope(R"("rope_theta": 5, "rope_scaling": {}, "rope_parameters": {"rope_theta": 6})").theta, 6);
  EXPECT_EQ(rope(R"("rope_scaling": {"type": "x", "rope_type": "linear", "factor": 1})").type, RopeType::linear);
  EXPECT_EQ(rope(R"("rope_scaling": {"type": "linear", "factor": 1}, "rope_parameters": {"rope_type": "yarn"})").type,
            RopeType::linear);

  const RopeSpec yarn =
      rope(R"("rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
    "beta_fast": 16, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": false})");
  EXPECT_EQ(yarn.original_max_position_embeddings, 1024);
  EXPECT_EQ(yarn.beta_fast, 16);
  EXPECT_EQ(yarn.beta_slow, 1);
  EXPECT_EQ(yarn.mscale, 0.7);
  EXPECT_FALSE(yarn.attention_factor);
  EXPECT_FALSE(yarn.truncate);
  EXPECT_EQ(
      rope(R"("rope_scaling": {"type": "yarn", "factor": null, "original_max_position_embeddings": 1024})").factor, 4);

  const RopeSpec longrope = rope(R"("original_max_position_embeddings": 2048, "rope_scaling": {"type": "longrope",
    "short_factor": [1, 1, 1, 1.5], "long_factor": [2, 3, 4, 5], "original_max_position_embeddings": 9})");
  EXPECT_EQ(longrope.original_max_position_embeddings, 2048);
  EXPECT_EQ(longrope.factor, 2);
  EXPECT_THAT(longrope.short_factor, ElementsAre(1, 1, 1, 1.5));
}

TEST_F(ModelSpecTest, BadRopeIsRefusedByName) {
  const auto rope = [&](const std::string& scaling) {
    return refusal("LlamaForCausalLM", "\"hidden_size\": 256, \"rope_scaling\": " + scaling);
  };
  EXPECT_THAT(rope(R"({"type": "mrope", "factor": 1})"), HasSubstr("\"mrope\", supported are default"));
  EXPECT_THAT(rope(R"({"type": "linear"})"), HasSubstr("rope_scaling has no factor"));
  EXPECT_THAT(rope(R"({"type": "linear", "factor": "2"})"), HasSubstr("factor is \"2\""));
  EXPECT_THAT(rope(R"({"type": "linear", "factor": 0})"), HasSubstr("above 0"));
  EXPECT_THAT(rope(R"({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})"),
              HasSubstr("high_freq_factor"));
  EXPECT_THAT(rope(R"({"type": "longrope", "short_factor": [1], "long_factor": [1]})"), HasSubstr("head_dim / 2 = 4"));
  EXPECT_THAT(rope(R"({"rope_type": "default", "partial_rotary_factor": 0.5})"), HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(rope(R"({"full_attention": {"rope_type": "default"}})"), HasSubstr("per layer type"));
  EXPECT_THAT(rope("3"), HasSubstr("must be an object"));
}

TEST_F(ModelSpecTest, EndOfSequenceComesFromGenerationConfigFirst) {
  write("generation_config.json", R"({"eos_token_id": [7, 8]})");
  EXPECT_THAT(read("Qwen2ForCausalLM", R"("eos_token_id": 9)").eos_token_ids, ElementsAre(7, 8));
  write("generation_config.json", R"({"eos_token_id": null})");
  EXPECT_THAT(read("Qwen2ForCausalLM", R"("eos_token_id": 9)").eos_token_ids, ElementsAre(9));
  write("generation_config.json", "{}");
  EXPECT_THAT(read("LlamaForCausalLM", R"("eos_token_id": null, "bos_token_id": null)").eos_token_ids, ElementsAre());
  EXPECT_EQ(read("LlamaForCausalLM", R"("bos_token_id": null)").bos_token_id, -1);
  EXPECT_THAT(refusal("LlamaForCausalLM", R"("eos_token_id": "x")"), HasSubstr("eos_token_id is \"x\""));
}

TEST_F(ModelSpecTest, UnsupportedOptionsAreRefusedByName) {
  const std::string a = "LlamaForCausalLM";
  EXPECT_THAT(refusal(a, R"("hidden_act": "gelu")"), HasSubstr("hidden_act is \"gelu\", supported is silu"));
  EXPECT_THAT(refusal(a, R"("quantization_config": {"bits": 4})"), HasSubstr("quantization_config"));
  EXPECT_THAT(refusal(a, R"("num_key_value_heads": 5)"), HasSubstr("must divide num_attention_heads = 32"));
  EXPECT_THAT(refusal(a, R"("hidden_size": 100)"), HasSubstr("multiple"));
  EXPECT_EQ(refusal(a, R"("hidden_size": 100, "head_dim": 24)"), "accepted");
  EXPECT_THAT(refusal(a, R"("hidden_size": 96)"), HasSubstr("head_dim"));
  EXPECT_THAT(refusal(a, R"("hidden_size": 0)"), HasSubstr("hidden_size is 0"));
  EXPECT_THAT(refusal(a, R"("hidden_size": 1e3)"), HasSubstr("integer"));
  EXPECT_THAT(refusal(a, R"("num_hidden_layers": 1000000000000)"), HasSubstr("num_hidden_layers"));
  EXPECT_THAT(refusal(a, R"("tie_word_embeddings": 1)"), HasSubstr("true or false"));
}

TEST_F(ModelSpecTest, WeightNamesAndShapes) {
  const ModelSpec spec =
      read("Qwen3ForCausalLM", R"("hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 24, "intermediate_size": 200, "num_hidden_layers": 2, "vocab_size": 300, "attention_bias": true)");
  std::map<std::string, std::vector<std::int64_t>> shapes;
  for (const BaseTensor& tensor : list_tensors(base_tensors(spec))) {
    EXPECT_TRUE(shapes.emplace(tensor.name, tensor.shape).second) << tensor.name;
  }
  EXPECT_EQ(shapes.size(), 2u * (2 + 2 + 4 + 4 + 3) + 3);
  EXPECT_THAT(shapes.at("model.layers.1.self_attn.k_proj.weight"), ElementsAre(48, 96));
  EXPECT_THAT(shapes.at("model.layers.1.self_attn.o_proj.bias"), ElementsAre(96));
  EXPECT_THAT(shapes.at("model.layers.0.self_attn.q_norm.weight"), ElementsAre(24));
  EXPECT_THAT(shapes.at("model.layers.0.mlp.down_proj.weight"), ElementsAre(96, 200));
  EXPECT_THAT(shapes.at("lm_head.weight"), ElementsAre(300, 96));
  EXPECT_EQ(base_tensors(spec).unembedding->name, "lm_head.weight");
  EXPECT_EQ(base_tensors(spec).layers[0].up.weight.name, "model.layers.0.mlp.up_proj.weight");

  const ModelSpec tied = read("LlamaForCausalLM", R"("tie_word_embeddings": true)");
  EXPECT_FALSE(base_tensors(tied).unembedding);
  for (const BaseTensor& tensor : list_tensors(base_tensors(tied))) EXPECT_NE(tensor.name, "lm_head.weight");
}

}  // namespace
}  // namespace ht::model_spec
