#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "base/error.h"
#include "engine/runtime/adapter.h"
#include "engine/runtime/base_model.h"
#include "engine/runtime/forward.h"
#include "engine/runtime/test_checkpoint.h"

namespace ht::engine {
namespace {

using ::testing::HasSubstr;

template <typename F>
std::string user_error_of(const F& f) {
  try {
    f();
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
    return error.what();
  }
  return "no error";
}

struct RuntimeTest : ::testing::Test {
  TemporaryDirectory temporary;
  model_spec::ModelSpec spec;

  void SetUp() override {
    write_test_checkpoint(temporary.path());
    spec = model_spec::read_model_spec(temporary.path());
  }

  Adapter random_adapter(const model_spec::LoraConfig& config) {
    Adapter adapter = Adapter::create(spec, config);
    const AdapterView view = make_adapter_view(cpu_device(), adapter.weights);
    // Real entries only: padding stays zero.
    const auto fill = [&](const LoraFactors& factors) {
      for (const LoraPart& part : factors.parts) part.b.narrow(1, 0, config.rank).normal_();
    };
    for (const auto& layer : view.layers) std::for_each(layer.begin(), layer.end(), fill);
    fill(view.unembed);
    const at::Tensor real = adapter.weights.flat.ne(0).to(at::kFloat);
    adapter.grad = at::randn_like(real) * real;
    adapter.exp_avg = at::randn_like(real) * real;
    adapter.exp_avg_sq = at::rand_like(real) * real;
    adapter.step = 7;
    return adapter;
  }
};

TEST_F(RuntimeTest, LayoutStacksFactorsThatShareAnInput) {
  const AdapterLayout layout(spec, {.rank = 2});
  EXPECT_EQ(layout.padded_rank(), 8);
  EXPECT_EQ(layout.scale(), 16.0);
  EXPECT_EQ(layout.site(1).a_offset, layout.site(0).a_offset + 8 * 16);
  EXPECT_EQ(layout.site(2).a_offset, layout.site(1).a_offset + 8 * 16);
  EXPECT_EQ(layout.site(5).a_offset, layout.site(4).a_offset + 8 * 16);
  std::int64_t sum = 0;
  for (const auto& site : layout.sites()) sum += 8 * (site.in_features + site.out_features);
  EXPECT_EQ(layout.numel(), sum);
}

TEST_F(RuntimeTest, FreshAdapterHasItsSeededAAndZeroB) {
  const Adapter adapter = Adapter::create(spec, {.rank = 2, .seed = 5, .train_mlp = false});
  const AdapterView view = make_adapter_view(cpu_device(), adapter.weights);
  const LoraFactors& qkv = view.layers[1][static_cast<int>(LoraSlot::qkv)];
  const std::size_t k_site = 7 + 1;
  const std::vector<float> a = model_spec::initial_lora_a(adapter.weights.layout->sites()[k_site], 2, 5);
  EXPECT_TRUE(at::equal(qkv.a.narrow(0, 8, 2).flatten(), at::tensor(a)));
  EXPECT_EQ(qkv.a.narrow(0, 10, 6).abs().sum().item<float>(), 0.0f);
  EXPECT_EQ(qkv.parts[1].b.abs().sum().item<float>(), 0.0f);
  EXPECT_FALSE(view.layers[1][static_cast<int>(LoraSlot::gate_up)].a.defined());
}

TEST_F(RuntimeTest, RankMustBeAPowerOfTwoUpTo256) {
  for (const int rank : {0, -1, 3, 512}) {
    EXPECT_THAT(user_error_of([&] { AdapterLayout(spec, {.rank = rank}); }), HasSubstr(std::to_string(rank)));
  }
  EXPECT_THAT(user_error_of([&] {
                AdapterLayout(spec, {.rank = 8, .train_attn = false, .train_mlp = false, .train_unembed = false});
              }),
              HasSubstr("at least one"));
}

TEST_F(RuntimeTest, FilesRoundTripBitExactly) {
  for (const int rank : {1, 8, 32}) {
    const model_spec::LoraConfig config{.rank = rank, .train_unembed = rank != 8};
    const Adapter adapter = random_adapter(config);
    TemporaryDirectory out;
    EXPECT_GT(save_adapter_weights(adapter.weights, "base", out.path()), 0u);
    save_optimizer(adapter, out.path());
    const model_spec::LoraConfig read = read_lora_config(out.path());
    EXPECT_EQ(read.rank, rank);
    EXPECT_EQ(read.train_unembed, rank != 8);
    Adapter loaded = Adapter::create(spec, read);
    loaded.weights = load_adapter_weights(spec, out.path());
    load_optimizer(loaded, out.path());
    EXPECT_TRUE(at::equal(loaded.weights.flat, adapter.weights.flat));
    EXPECT_TRUE(at::equal(loaded.exp_avg, adapter.exp_avg));
    EXPECT_TRUE(at::equal(loaded.exp_avg_sq, adapter.exp_avg_sq));
    EXPECT_EQ(loaded.step, 7);
  }
}

TEST_F(RuntimeTest, FilesHaveTheNamesAndShapesOfThePeftLayout) {
  const Adapter adapter = random_adapter({.rank = 2});
  TemporaryDirectory out;
  save_adapter_weights(adapter.weights, "org/base", out.path());
  const auto file = safetensors::Checkpoint::open_file(out.path() / "adapter_model.safetensors");
  EXPECT_EQ(file.names().size(), 2u * (2 * 7 + 1));
  EXPECT_EQ(file.at("base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight").shape,
            (std::vector<std::int64_t>{2, 16}));
  EXPECT_EQ(file.at("base_model.model.model.unembed_tokens.lora_B.weight").shape, (std::vector<std::int64_t>{31, 2}));
  std::stringstream config;
  config << std::ifstream(out.path() / "adapter_config.json").rdbuf();
  EXPECT_THAT(config.str(), HasSubstr("\"lora_alpha\":32"));
  EXPECT_THAT(config.str(), HasSubstr("\"base_model_name_or_path\":\"org/base\""));
}

TEST_F(RuntimeTest, StateRoundTripsBitExactly) {
  const Adapter adapter = random_adapter({.rank = 4, .seed = 123456789012345, .train_mlp = false});
  save_adapter_state(adapter, temporary.path() / "state.safetensors");
  const Adapter loaded = load_adapter_state(spec, temporary.path() / "state.safetensors");
  EXPECT_EQ(loaded.weights.layout->config(), adapter.weights.layout->config());
  EXPECT_TRUE(at::equal(loaded.weights.flat, adapter.weights.flat));
  EXPECT_TRUE(at::equal(loaded.grad, adapter.grad));
  EXPECT_TRUE(at::equal(loaded.exp_avg, adapter.exp_avg));
  EXPECT_TRUE(at::equal(loaded.exp_avg_sq, adapter.exp_avg_sq));
  EXPECT_EQ(loaded.step, 7);
}

TEST_F(RuntimeTest, FrozenCopyDoesNotFollowTheAdapter) {
  Adapter adapter = random_adapter({.rank = 4});
  const AdapterWeights frozen = freeze(adapter);
  const at::Tensor before = adapter.weights.flat.clone();
  adapter.weights.flat.add_(1.0);
  EXPECT_TRUE(at::equal(frozen.flat, before));
}

TEST_F(RuntimeTest, WrongAdapterFilesAreNamed) {
  const Adapter adapter = random_adapter({.rank = 2, .train_mlp = false});
  TemporaryDirectory out;
  save_adapter_weights(adapter.weights, "base", out.path());
  const auto with_config = [&](const std::string& text) {
    std::ofstream(out.path() / "adapter_config.json", std::ios::trunc) << text;
    return user_error_of([&] { load_adapter_weights(spec, out.path()); });
  };
  EXPECT_THAT(with_config("{"), HasSubstr("no JSON object"));
  EXPECT_THAT(with_config(R"({"r": 2, "lora_alpha": 16, "target_modules": ["q_proj"]})"), HasSubstr("lora_alpha"));
  EXPECT_THAT(with_config(R"({"r": 1e9, "lora_alpha": 32, "target_modules": ["q_proj"]})"), HasSubstr("r is"));
  EXPECT_THAT(with_config(R"({"r": 2, "lora_alpha": 32, "target_modules": "all-linear"})"),
              HasSubstr("target_modules"));
  EXPECT_THAT(with_config(R"({"r": 2, "lora_alpha": 32, "target_modules": ["q_proj"]})"), HasSubstr("unembed_tokens"));
  EXPECT_THAT(with_config(R"({"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "unembed_tokens"]})"),
              HasSubstr("[2, 16], expected [4, 16]"));
  EXPECT_THAT(with_config(R"({"r": 2, "lora_alpha": 32, "target_modules": ["q_proj", "gate_proj", "unembed_tokens"]})"),
              HasSubstr("gate_proj"));
  EXPECT_THAT(user_error_of([&] { read_lora_config("/nonexistent"); }), HasSubstr("/nonexistent"));
}

TEST_F(RuntimeTest, LoadReportsProgressAndNamesAMisshapenTensor) {
  std::vector<double> fractions;
  const auto model = BaseModel::load(temporary.path(), {.threads = 2},
                                     [&](double fraction, const std::string&) { fractions.push_back(fraction); });
  EXPECT_TRUE(std::is_sorted(fractions.begin(), fractions.end()));
  EXPECT_EQ(fractions.back(), 1.0);
  std::ifstream in(temporary.path() / "config.json");
  std::stringstream text;
  text << in.rdbuf();
  std::string changed = text.str();
  changed.replace(changed.find("\"intermediate_size\": 24"), 23, "\"intermediate_size\": 25");
  std::ofstream(temporary.path() / "config.json") << changed;
  EXPECT_THAT(user_error_of([&] { BaseModel::load(temporary.path(), {}); }),
              HasSubstr("model.layers.0.mlp.gate_proj.weight"));
}

}  // namespace
}  // namespace ht::engine
