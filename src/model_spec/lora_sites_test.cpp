#include "model_spec/lora_sites.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>

namespace ht::model_spec {
namespace {

ModelSpec qwen3_8b() {
  ModelSpec spec;
  spec.hidden_size = 4096;
  spec.intermediate_size = 12288;
  spec.num_hidden_layers = 36;
  spec.num_attention_heads = 32;
  spec.num_key_value_heads = 8;
  spec.head_dim = 128;
  spec.vocab_size = 151936;
  return spec;
}

ModelSpec qwen3_4b() {
  ModelSpec spec = qwen3_8b();
  spec.hidden_size = 2560;
  spec.intermediate_size = 9728;
  return spec;
}

std::int64_t count(const ModelSpec& spec, int rank, bool attn, bool mlp, bool unembed) {
  return num_lora_parameters(spec, {.rank = rank, .train_attn = attn, .train_mlp = mlp, .train_unembed = unembed});
}

// The cookbook's table of adapter parameters (get_lora_param_count).
TEST(LoraSites, ParameterCountsAreThePublishedOnes) {
  EXPECT_EQ(count(qwen3_8b(), 1, false, true, false), 1'769'472);
  EXPECT_EQ(count(qwen3_8b(), 1, true, false, false), 958'464);
  EXPECT_EQ(count(qwen3_8b(), 1, false, false, true), 156'032);
  EXPECT_EQ(count(qwen3_4b(), 1, false, true, false), 1'327'104);
  EXPECT_EQ(count(qwen3_4b(), 1, true, false, false), 737'280);
  EXPECT_EQ(count(qwen3_4b(), 1, false, false, true), 154'496);
  EXPECT_EQ(count(qwen3_8b(), 32, true, true, true), 32 * (1'769'472 + 958'464 + 156'032));
}

TEST(LoraSites, FollowTheForwardPass) {
  const auto sites = lora_sites(qwen3_4b());
  ASSERT_EQ(sites.size(), 36u * 7 + 1);
  EXPECT_EQ(sites[7].module, "model.layers.1.self_attn.q_proj");
  EXPECT_EQ(sites[7].out_features, 4096);
  EXPECT_EQ(sites[10].module, "model.layers.1.self_attn.o_proj");
  EXPECT_EQ(sites[10].in_features, 4096);
  EXPECT_EQ(sites[10].out_features, 2560);
  EXPECT_EQ(sites[13].module, "model.layers.1.mlp.down_proj");
  EXPECT_EQ(sites[13].in_features, 9728);
  EXPECT_EQ(sites.back().module, "model.unembed_tokens");
  EXPECT_EQ(sites.back().layer, -1);
}

TEST(InitialLoraA, DependsOnSeedSiteAndElementAlone) {
  const LoraSite site{"model.layers.0.self_attn.q_proj", SiteGroup::attn, 0, 96, 64};
  const auto rank8 = initial_lora_a(site, 8, 7);
  const auto rank32 = initial_lora_a(site, 32, 7);
  ASSERT_EQ(rank8.size(), 8u * 96);
  EXPECT_TRUE(std::equal(rank8.begin(), rank8.end(), rank32.begin()));
  EXPECT_NE(initial_lora_a(site, 8, 8), rank8);
  EXPECT_NE(initial_lora_a(site, 8, 7 + (std::uint64_t{1} << 32)), rank8);
  LoraSite other = site;
  other.module = "model.layers.1.self_attn.q_proj";
  EXPECT_NE(initial_lora_a(other, 8, 7), rank8);
  // Computed by another program. A change here breaks every stored run.
  const std::vector<double> expected = {0.050829506, 0.050932413, -0.058270871, 0.041806963};
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(rank8[i], expected[i], 1e-8);
}

TEST(InitialLoraA, IsUniform) {
  const LoraSite site{"model.unembed_tokens", SiteGroup::unembed, -1, 4096, 10};
  const auto values = initial_lora_a(site, 64, 1);
  double sum = 0, squares = 0;
  const double bound = 1.0 / 64;
  for (const float v : values) {
    ASSERT_LE(std::abs(v), bound);
    sum += v;
    squares += double{v} * v;
  }
  const double n = static_cast<double>(values.size());
  EXPECT_NEAR(sum / n / bound, 0, 5 / std::sqrt(3 * n));
  EXPECT_NEAR(squares / n / (bound * bound), 1.0 / 3, 0.005);
}

}  // namespace
}  // namespace ht::model_spec
