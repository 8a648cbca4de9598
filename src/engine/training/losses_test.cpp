#include "engine/training/losses.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace ht::engine {
namespace {

using worker_protocol::LossConfig;
using worker_protocol::LossKind;

const std::vector<float> kLogprobs = {-1.0f, -0.5f, -3.0f, -0.1f};
const std::vector<float> kOld = {-1.3f, -0.4f, -2.0f, -0.9f};
const std::vector<float> kAdvantages = {1.0f, -2.0f, 0.5f, 3.0f};

LossInputs policy_inputs() {
  LossInputs inputs;
  inputs.logprobs = kLogprobs;
  inputs.old_logprobs = kOld;
  inputs.advantages = kAdvantages;
  return inputs;
}

// The loss of token i alone by its formula, with the stop-gradient factor evaluated at `at`.
double formula(LossKind kind, const LossConfig& c, std::size_t i, double lp, double at) {
  const double q = kOld[i], a = kAdvantages[i];
  const double ratio = std::exp(lp - q), frozen = std::exp(at - q);
  const auto clip = [&](double r) { return std::min(std::max(r, c.clip_low_threshold), c.clip_high_threshold); };
  switch (kind) {
    case LossKind::importance_sampling:
      return -ratio * a;
    case LossKind::ppo:
      return -std::min(ratio * a, clip(ratio) * a);
    case LossKind::cispo:
      return -clip(frozen) * lp * a;
    case LossKind::dro:
      return -(lp * a - 0.5 * c.beta * (lp - q) * (lp - q));
    case LossKind::stable_reinforce:
      return -std::min(frozen, c.ratio_max) * a * lp;
    default:
      ADD_FAILURE();
      return 0;
  }
}

TEST(Losses, PolicyLossesMatchTheirFormulasAndDifferences) {
  const LossConfig config{.clip_low_threshold = 0.8, .clip_high_threshold = 1.2, .beta = 0.3, .ratio_max = 1.1};
  for (const LossKind kind :
       {LossKind::importance_sampling, LossKind::ppo, LossKind::cispo, LossKind::dro, LossKind::stable_reinforce}) {
    std::vector<float> gradient(4);
    const double loss = token_loss(kind, config, policy_inputs(), gradient);
    double expected = 0;
    for (std::size_t i = 0; i < 4; ++i) {
      const double lp = kLogprobs[i], h = 1e-6;
      expected += formula(kind, config, i, lp, lp);
      const double slope = (formula(kind, config, i, lp + h, lp) - formula(kind, config, i, lp - h, lp)) / (2 * h);
      EXPECT_NEAR(gradient[i], slope, 1e-5) << static_cast<int>(kind) << " " << i;
    }
    EXPECT_NEAR(loss, expected, 1e-6) << static_cast<int>(kind);
  }
}

TEST(Losses, GspoUsesTheMaskedSequenceRatio) {
  const std::vector<float> mask = {1, 0, 1, 0};
  LossInputs inputs = policy_inputs();
  inputs.sequence_ratio_mask = mask;
  std::vector<float> gradient(4);
  const LossConfig config{.clip_low_threshold = 0.8, .clip_high_threshold = 1.2};
  const double s = std::exp(((-1.0 + 1.3) + (-3.0 + 2.0)) / 2);  // 0.705, below the lower bound
  const double loss = token_loss(LossKind::gspo, config, inputs, gradient);
  EXPECT_NEAR(loss, -(s * 1.0 + 0.8 * -2.0 + s * 0.5 + s * 3.0), 1e-6);
  EXPECT_NEAR(gradient[0], -s, 1e-6);
  EXPECT_EQ(gradient[1], 0.0f);  // clipped: a negative advantage below the bound
  EXPECT_NEAR(gradient[3], -3 * s, 1e-6);
}

TEST(Losses, ThresholdsPerPositionReplaceTheConfig) {
  const std::vector<float> low(4, 0.99f), high(4, 1.01f);
  LossInputs inputs = policy_inputs();
  std::vector<float> wide(4), narrow(4);
  const LossConfig config{.clip_low_threshold = 0.0, .clip_high_threshold = 100.0};
  token_loss(LossKind::ppo, config, inputs, wide);
  inputs.clip_low = low;
  inputs.clip_high = high;
  token_loss(LossKind::ppo, config, inputs, narrow);
  EXPECT_NE(wide[0], 0.0f);
  EXPECT_EQ(narrow[0], 0.0f);
}

TEST(Losses, CrossEntropyWeights) {
  LossInputs inputs;
  inputs.logprobs = kLogprobs;
  std::vector<float> gradient(4);
  EXPECT_NEAR(token_loss(LossKind::cross_entropy, {}, inputs, gradient), 4.6, 1e-6);
  EXPECT_EQ(gradient, std::vector<float>(4, -1.0f));
  const std::vector<float> weights = {0.0f, -2.0f, 0.5f, 1.0f};
  inputs.weights = weights;
  EXPECT_NEAR(token_loss(LossKind::cross_entropy, {}, inputs, gradient), -1.0 + 1.5 + 0.1, 1e-6);
  EXPECT_EQ(gradient, (std::vector<float>{0.0f, 2.0f, -0.5f, -1.0f}));
}

TEST(Losses, ZeroWeightIsExactlyZeroAtMinusInfinity) {
  const std::vector<float> lp(4, -std::numeric_limits<float>::infinity()), zero(4, 0.0f);
  LossInputs inputs = policy_inputs();
  inputs.logprobs = lp;
  inputs.weights = zero;
  inputs.advantages = zero;
  std::vector<float> gradient(4, 1.0f);
  for (const LossKind kind : {LossKind::cross_entropy, LossKind::importance_sampling, LossKind::ppo, LossKind::cispo,
                              LossKind::gspo, LossKind::stable_reinforce}) {
    EXPECT_EQ(token_loss(kind, {.clip_high_threshold = 1, .ratio_max = 2}, inputs, gradient), 0.0);
    for (const float g : gradient) EXPECT_EQ(g, 0.0f);
  }
}

}  // namespace
}  // namespace ht::engine
