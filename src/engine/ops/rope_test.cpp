#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <numbers>

#include "engine/ops/rope.h"

namespace ht::engine {
namespace {

using model_spec::ModelSpec;
using model_spec::RopeType;

ModelSpec spec_of(RopeType type) {
  ModelSpec spec;
  spec.head_dim = 8;
  spec.max_position_embeddings = 64;
  spec.rope.type = type;
  spec.rope.theta = 10000.0;
  spec.rope.factor = 4.0;
  spec.rope.original_max_position_embeddings = 16;
  spec.rope.short_factor = {1, 1, 1, 1};
  spec.rope.long_factor = {1, 2, 3, 4};
  return spec;
}

TEST(Rope, StandardAndLinear) {
  const RopeFrequencies standard = rope_frequencies(spec_of(RopeType::standard), 10);
  const RopeFrequencies linear = rope_frequencies(spec_of(RopeType::linear), 10);
  for (std::size_t i = 0; i < 4; ++i) {
    const double expected = std::pow(10000.0, -2.0 * static_cast<double>(i) / 8.0);
    EXPECT_NEAR(standard.inverse[i], expected, 1e-6 * expected);
    EXPECT_NEAR(linear.inverse[i], expected / 4.0, 1e-6 * expected);
  }
  EXPECT_EQ(standard.scaling, 1.0f);
}

TEST(Rope, DynamicChangesBeyondTheTrainedLength) {
  const ModelSpec spec = spec_of(RopeType::dynamic);
  EXPECT_EQ(rope_frequencies(spec, 64).inverse, rope_frequencies(spec, 3).inverse);
  const double base = 10000.0 * std::pow(4.0 * 128 / 64 - 3.0, 8.0 / 6.0);
  EXPECT_NEAR(rope_frequencies(spec, 128).inverse[1], std::pow(base, -0.25), 1e-7);
}

TEST(Rope, LongropePicksItsFactorsByLength) {
  const ModelSpec spec = spec_of(RopeType::longrope);
  const float short_last = rope_frequencies(spec, 16).inverse[3], long_last = rope_frequencies(spec, 17).inverse[3];
  EXPECT_NEAR(short_last / long_last, 4.0f, 1e-5f);
  EXPECT_NEAR(rope_frequencies(spec, 1).scaling, std::sqrt(1.0 + std::log(4.0) / std::log(16.0)), 1e-6);
}

TEST(Rope, TableFollowsPositionsOfEachSequence) {
  const ModelSpec spec = spec_of(RopeType::dynamic);
  std::vector<std::int32_t> tokens(103, 0), positions, cu = {0, 3, 103};
  for (int i = 0; i < 3; ++i) positions.push_back(i);
  for (int i = 0; i < 100; ++i) positions.push_back(i);
  const RopeTable table = rope_table(spec, {tokens, positions, cu});
  const auto cos = [&](int row, int column) { return table.cos.const_data_ptr<float>()[row * 4 + column]; };
  EXPECT_NEAR(cos(2, 1), std::cos(2.0 * rope_frequencies(spec, 3).inverse[1]), 1e-6);
  EXPECT_NEAR(cos(3 + 99, 1), std::cos(99.0f * rope_frequencies(spec, 100).inverse[1]), 1e-6);
}

}  // namespace
}  // namespace ht::engine
