#include "engine/sampling/token_distribution.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <vector>

namespace ht::engine {
namespace {

std::vector<float> random_logits(int size, unsigned seed, float spread = 2.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(static_cast<std::size_t>(size));
  for (float& logit : logits) logit = normal(random);
  return logits;
}

// The plain statement in double: softmax, then top-k, then top-p on what is left.
std::vector<double> reference(const std::vector<float>& logits, double temperature, int top_k, double top_p) {
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  if (top_k > 0 && top_k < static_cast<int>(order.size())) order.resize(top_k);
  std::vector<double> p(logits.size());
  double sum = 0;
  for (int i : order) sum += p[i] = std::exp((double{logits[i]} - logits[order[0]]) / temperature);
  if (top_p < 1) {
    double cumulative = 0, kept = 0;
    for (int i : order) {
      const double weight = p[i];
      if (cumulative < top_p * sum) {
        kept += weight;
      } else {
        p[i] = 0;
      }
      cumulative += weight;
    }
    sum = kept;
  }
  for (double& value : p) value /= sum;
  return p;
}

struct Case {
  int vocab;
  float temperature;
  int top_k;
  float top_p;
};

class Draws : public testing::TestWithParam<Case> {};

// Pearson's χ² of 40,000 draws; cells expected less than 8 times are pooled. The bound is the mean plus five standard
// deviations: a sampler that is right fails once in millions, and the draws are fixed by the seed.
TEST_P(Draws, FollowTheDistribution) {
  const Case c = GetParam();
  const std::vector<float> logits = random_logits(c.vocab, 11);
  const std::vector<double> p = reference(logits, c.temperature, c.top_k, c.top_p);
  const TokenDistribution distribution(logits, c.temperature, c.top_k, c.top_p);
  constexpr int kDraws = 40'000;
  std::vector<int> counts(logits.size());
  for (int i = 0; i < kDraws; ++i) ++counts[distribution.draw(draw_unit(99, 1000 + i / 7, i % 7, DrawStream::sample))];
  double chi2 = 0, rest_expected = 0, rest_seen = 0;
  int cells = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    ASSERT_TRUE(p[i] > 0 || counts[i] == 0) << "token " << i << " is outside the support";
    const double expected = p[i] * kDraws;
    if (expected < 8) {
      rest_expected += expected;
      rest_seen += counts[i];
      continue;
    }
    chi2 += (counts[i] - expected) * (counts[i] - expected) / expected;
    ++cells;
  }
  if (rest_expected >= 8) {
    chi2 += (rest_seen - rest_expected) * (rest_seen - rest_expected) / rest_expected;
    ++cells;
  }
  const double freedom = std::max(1, cells - 1);
  EXPECT_GE(cells, 2);
  EXPECT_LT(chi2, freedom + 5 * std::sqrt(2 * freedom)) << cells << " cells";
}

INSTANTIATE_TEST_SUITE_P(Settings, Draws,
                         testing::Values(Case{50, 1.0f, -1, 1.0f}, Case{1000, 1.0f, -1, 1.0f},
                                         Case{1000, 0.5f, -1, 1.0f}, Case{1000, 2.0f, 0, 1.0f},
                                         Case{1000, 1.0f, 20, 1.0f}, Case{1000, 1.0f, -1, 0.7f},
                                         Case{1000, 1.3f, 50, 0.8f}, Case{300, 1.0f, 5000, 0.95f},
                                         Case{257, 1.0f, 2, 1.0f}));

TEST(TokenDistribution, LogprobIsBeforeTruncation) {
  const std::vector<float> logits = random_logits(3000, 3);
  for (const float temperature : {1.0f, 0.6f, 1.7f}) {
    const std::vector<double> p = reference(logits, temperature, -1, 1.0);
    const TokenDistribution distribution(logits, temperature, 5, 0.5f);
    for (int token : {0, 17, 2999}) EXPECT_NEAR(distribution.logprob(token), std::log(p[token]), 2e-6);
  }
}

TEST(TokenDistribution, TemperatureZeroIsGreedyWithLogprobOfTheLogits) {
  std::vector<float> logits = random_logits(500, 4);
  logits[40] = logits[200] = 30.0f;  // a tie goes to the lower token
  const TokenDistribution distribution(logits, 0.0f, 10, 0.5f);
  for (const double unit : {0.0, 0.5, 0.999999}) EXPECT_EQ(distribution.draw(unit), 40);
  EXPECT_NEAR(distribution.logprob(40), std::log(reference(logits, 1.0, -1, 1.0)[40]), 1e-6);
  EXPECT_EQ(TokenDistribution(logits, 1e-42f).draw(0.7), 40);
}

TEST(TokenDistribution, TopOneIsGreedyAtAnyTemperature) {
  const std::vector<float> logits = random_logits(500, 5);
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  for (const double unit : {0.0, 0.5, 0.999999}) {
    EXPECT_EQ(TokenDistribution(logits, 3.0f, 1).draw(unit), best);
    EXPECT_EQ(TokenDistribution(logits, 3.0f, -1, 0.0f).draw(unit), best);
  }
}

TEST(TokenDistribution, TopTokensAreSortedAndPaddedBeyondTheVocabulary) {
  const std::vector<float> logits = {1.0f, 3.0f, 2.0f, 3.0f};
  const TokenDistribution distribution(logits, 1.0f);
  std::int32_t tokens[6];
  float logprobs[6];
  distribution.top(6, tokens, logprobs);
  EXPECT_EQ(std::vector<std::int32_t>(tokens, tokens + 6), (std::vector<std::int32_t>{1, 3, 2, 0, 0, 0}));
  EXPECT_EQ(logprobs[0], distribution.logprob(1));
  EXPECT_EQ(logprobs[3], distribution.logprob(0));
  EXPECT_EQ(logprobs[4], -99999.0f);
  EXPECT_EQ(logprobs[5], -99999.0f);
}

TEST(TokenDistribution, ExtremesOfTheUnitStayInsideTheSupport) {
  const std::vector<float> logits = {-INFINITY, 0.0f, 1.0f, -INFINITY};
  for (const float top_p : {1.0f, 0.99f}) {
    const TokenDistribution distribution(logits, 1.0f, -1, top_p);
    EXPECT_GE(distribution.draw(0.0), 1);
    EXPECT_LE(distribution.draw(0.0), 2);
    EXPECT_LE(distribution.draw(std::nextafter(1.0, 0.0)), 2);
  }
}

TEST(TokenDistribution, ReportsLogitsThatAreNotFinite) {
  EXPECT_FALSE(TokenDistribution(std::vector<float>{1.0f, NAN, 2.0f}, 1.0f).finite());
  EXPECT_FALSE(TokenDistribution(std::vector<float>{1.0f, INFINITY}, 1.0f).finite());
  EXPECT_FALSE(TokenDistribution(std::vector<float>(300, -INFINITY), 1.0f).finite());
  EXPECT_TRUE(TokenDistribution(std::vector<float>{1.0f, -INFINITY}, 1.0f).finite());
}

TEST(DrawUnit, DependsOnEveryArgumentAndIsUniform) {
  const double base = draw_unit(1, 2, 3, DrawStream::sample);
  EXPECT_EQ(base, draw_unit(1, 2, 3, DrawStream::sample));
  EXPECT_NE(base, draw_unit(2, 2, 3, DrawStream::sample));
  EXPECT_NE(base, draw_unit(1, 3, 3, DrawStream::sample));
  EXPECT_NE(base, draw_unit(1, 2, 4, DrawStream::sample));
  EXPECT_NE(base, draw_unit(1, 2, 3, DrawStream::alternative));
  double sum = 0;
  for (int i = 0; i < 10'000; ++i) {
    const double unit = draw_unit(7, i, 0, DrawStream::sample);
    ASSERT_GE(unit, 0.0);
    ASSERT_LT(unit, 1.0);
    sum += unit;
  }
  EXPECT_NEAR(sum / 10'000, 0.5, 0.015);
}

}  // namespace
}  // namespace ht::engine
