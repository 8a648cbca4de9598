#include "model_spec/memory_plan.h"

#include <gmock/gmock.h>

#include "base/error.h"

namespace ht::model_spec {
namespace {

// SmolLM2-135M.
ModelSpec smollm2() {
  ModelSpec spec;
  spec.hidden_size = 576;
  spec.intermediate_size = 1536;
  spec.num_hidden_layers = 30;
  spec.num_attention_heads = 9;
  spec.num_key_value_heads = 3;
  spec.head_dim = 64;
  spec.vocab_size = 49152;
  spec.tie_word_embeddings = true;
  return spec;
}

TEST(MemoryPlan, CategoriesAreCountedFromTheShapes) {
  const MemoryPlan plan = plan_memory(
      smollm2(), {.lora = {.rank = 32}, .num_adapters = 2, .micro_batch_tokens = 2048, .cache_tokens = 1000});
  EXPECT_EQ(plan.base_weights, 134'515'008u * 4);
  EXPECT_EQ(plan.adapters, static_cast<std::uint64_t>(num_lora_parameters(smollm2(), {.rank = 32})) * 4 * 6 * 2);
  EXPECT_EQ(plan.kv_cache, 1000u * 30 * 2 * 192 * 4);
  EXPECT_EQ(plan.total(), plan.base_weights + plan.adapters + plan.activations + plan.kv_cache);
}

TEST(MemoryPlan, The16BitCopyIsOfTheLinears) {
  const MemoryPlan plan = plan_memory(smollm2(), {.copy_16_bits = true});
  // The tied unembedding is one of them; norms are not.
  EXPECT_EQ(plan.base_copy, (134'515'008u - 61 * 576) * 2);
  EXPECT_EQ(plan_memory(smollm2(), {}).base_copy, 0u);
}

TEST(MemoryPlan, FreeMemoryIsDividedBetweenCacheAndVersions) {
  constexpr std::uint64_t kToken = 30 * 2 * 192 * 4;
  const auto divided = [](std::int64_t max_seq_len, std::uint64_t free, MemoryDemand demand = {}) {
    divide_free_memory(smollm2(), max_seq_len, free, demand);
    return demand;
  };
  EXPECT_EQ(divided(2048, 1u << 31).cache_tokens, (std::int64_t{1} << 31) / 4 / static_cast<std::int64_t>(kToken));
  EXPECT_EQ(divided(20000, 1u << 31).cache_tokens, 20000);
  EXPECT_EQ(divided(30000, 1u << 31).cache_tokens, (std::int64_t{1} << 31) / 2 / static_cast<std::int64_t>(kToken));
  EXPECT_EQ(divided(8192, std::uint64_t{1} << 40).cache_tokens, 32768);
  EXPECT_EQ(divided(100000, std::uint64_t{1} << 40).cache_tokens, 100000);
  EXPECT_EQ(divided(100000, 200001 * kToken).cache_tokens, 100000) << "a whole context, if half of the memory holds it";
  EXPECT_EQ(divided(100000, 100000 * kToken).cache_tokens, 50000);
  EXPECT_EQ(divided(8192, 0).cache_tokens, 1);
  const MemoryDemand given = divided(8192, 1000 * kToken, {.cache_tokens = 600});
  EXPECT_EQ(given.cache_tokens, 600);
  EXPECT_EQ(given.version_bytes, 400 * kToken / 8);
  // A tenth of all stays free, and the rest is for adapters and for writing them.
  EXPECT_EQ(given.copy_bytes, (400 * kToken - 50 * kToken - 100 * kToken) / 5);
  EXPECT_EQ(given.adapter_bytes, 4 * given.copy_bytes);
  const MemoryDemand both = divided(8192, 1000 * kToken, {.cache_tokens = 600, .adapter_bytes = 400 * kToken});
  EXPECT_EQ(both.adapter_bytes, 400 * kToken);
  EXPECT_EQ(both.version_bytes + both.copy_bytes, 0u);
  EXPECT_THROW(divided(8192, 1000 * kToken, {.cache_tokens = 600, .adapter_bytes = 400 * kToken + 1}), Error);
  EXPECT_THROW(divided(8192, 599 * kToken, {.cache_tokens = 600}), Error);
}

TEST(MemoryPlan, SmallRanksAreStoredAsEight) {
  const auto adapters = [](int rank) { return plan_memory(smollm2(), {.lora = {.rank = rank}}).adapters; };
  EXPECT_EQ(adapters(1), adapters(8));
  EXPECT_EQ(adapters(16), 2 * adapters(8));
}

TEST(MemoryPlan, RecomputeSavesActivations) {
  const auto activations = [](RecomputePolicy policy) {
    return plan_memory(smollm2(), {.micro_batch_tokens = 2048, .recompute = policy}).activations;
  };
  EXPECT_EQ(plan_memory(smollm2(), {}).activations, 0u);
  // A block keeps norms' outputs and gate, up, act less: 28 blocks' worth, as one is computed again at a time, in
  // memory beside its forward's; and two chunks of logits.
  EXPECT_EQ(activations(RecomputePolicy::none) - activations(RecomputePolicy::norms_mlp),
            28u * 2048 * 4 * (2 * 576 + 3 * 1536) - 2u * 256 * 49152 * 4);
  // Measured peaks of a step above the loaded model, without the adapter's gradient, in MiB.
  const auto near_measured = [&](RecomputePolicy policy, double mib) {
    EXPECT_NEAR(static_cast<double>(activations(policy)) / (1 << 20), mib, 0.1 * mib);
  };
  near_measured(RecomputePolicy::none, 2185 - 87);
  near_measured(RecomputePolicy::norms_mlp, 993 - 87);
  near_measured(RecomputePolicy::block, 567 - 87);
  EXPECT_LT(activations(RecomputePolicy::block), activations(RecomputePolicy::norms_mlp) / 2);
}

TEST(MemoryPlan, TextHasALineACategory) {
  const std::string text =
      plan_memory(smollm2(), {.micro_batch_tokens = 512, .recompute = RecomputePolicy::block, .cache_tokens = 4096})
          .to_text();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 6);
  EXPECT_THAT(text, testing::StartsWith("base weights    513.1 MiB  (float32)\n"));
  EXPECT_THAT(text, testing::HasSubstr("micro-batch of 512 tokens, recompute block"));
  EXPECT_THAT(text, testing::HasSubstr("KV cache        180.0 MiB  (4096 tokens)\n"));
}

TEST(MemoryPlan, SaysHowManyTenantsFitAndWhatALongDatumTakes) {
  const std::uint64_t one = adapter_bytes(smollm2(), {.rank = 16});
  MemoryDemand demand{.lora = {.rank = 16}, .micro_batch_tokens = 512, .adapter_bytes = 3 * one + one / 2};
  EXPECT_EQ(plan_memory(smollm2(), demand).tenants, 3);
  EXPECT_THAT(plan_memory(smollm2(), demand, 512).to_text(),
              testing::EndsWith("fits 3 tenants of rank 16 at length 512\n"));
  const MemoryPlan longer = plan_memory(smollm2(), demand, 2048);
  EXPECT_THAT(longer.to_text(), testing::HasSubstr("at length 512; a datum of 2048 tokens takes "));
  demand.micro_batch_tokens = 2048;
  EXPECT_EQ(longer.longest_datum, plan_memory(smollm2(), demand).activations);
}

}  // namespace
}  // namespace ht::model_spec
