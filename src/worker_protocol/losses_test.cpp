#include "worker_protocol/losses.h"

#include <gmock/gmock.h>

#include <limits>

#include "base/error.h"

namespace ht::worker_protocol {
namespace {

using testing::HasSubstr;

std::string refusal(const LossSpec& spec, std::string_view key, double value) {
  LossConfig config = spec.defaults;
  try {
    set_loss_config(spec, config, key, value);
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
    return error.what();
  }
  return "accepted";
}

TEST(Losses, TableIsInOrderAndFoundByName) {
  int kind = 1;
  for (const LossSpec& spec : loss_specs()) {
    EXPECT_EQ(static_cast<int>(spec.kind), kind++);
    EXPECT_EQ(find_loss(spec.name), &spec);
    EXPECT_EQ(&loss_spec(spec.kind), &spec);
    EXPECT_EQ(spec.allows_2d_targets, spec.name == "cross_entropy");
    EXPECT_EQ(spec.requires_spans, spec.name == "stable_reinforce");
  }
  EXPECT_EQ(kind, 8);
  EXPECT_EQ(find_loss("custom"), nullptr);
  EXPECT_EQ(find_loss(""), nullptr);
  EXPECT_THROW(loss_spec(static_cast<LossKind>(8)), Error);
}

TEST(Losses, DefaultsAreTheHostedOnes) {
  EXPECT_EQ(find_loss("ppo")->defaults, (LossConfig{.clip_low_threshold = 0.8, .clip_high_threshold = 1.2}));
  EXPECT_EQ(find_loss("cispo")->defaults, (LossConfig{.clip_low_threshold = 0.0, .clip_high_threshold = 4.0}));
  EXPECT_EQ(find_loss("gspo")->defaults, (LossConfig{.clip_low_threshold = 0.8, .clip_high_threshold = 1.2}));
  EXPECT_EQ(find_loss("dro")->defaults, LossConfig{.beta = 0.05});
  EXPECT_EQ(find_loss("stable_reinforce")->defaults, LossConfig{.ratio_max = 2.0});
}

TEST(Losses, ConfigKeysAreCheckedPerLoss) {
  LossConfig config = find_loss("ppo")->defaults;
  set_loss_config(*find_loss("ppo"), config, "clip_high_threshold", 1.5);
  EXPECT_EQ(config, (LossConfig{.clip_low_threshold = 0.8, .clip_high_threshold = 1.5}));
  EXPECT_THAT(refusal(*find_loss("ppo"), "beta", 1), HasSubstr("allowed: clip_low_threshold, clip_high_threshold"));
  EXPECT_THAT(refusal(*find_loss("cross_entropy"), "beta", 1), HasSubstr("has none"));
  EXPECT_THAT(refusal(*find_loss("dro"), "beta", std::numeric_limits<double>::quiet_NaN()), HasSubstr("finite"));
  EXPECT_EQ(refusal(*find_loss("dro"), "beta", -1), "accepted");
}

}  // namespace
}  // namespace ht::worker_protocol
