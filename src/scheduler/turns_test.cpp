#include "scheduler/turns.h"

#include <gtest/gtest.h>

namespace ht::scheduler {
namespace {

// Seconds of training and sampling when both always have work.
std::pair<double, double> compete(double share, double micro_batch, double step, int slices) {
  Turns turns(share);
  double train = 0, sample = 0;
  Turn last = Turn::none;
  for (int i = 0; i < slices; ++i) {
    const Turn turn = turns.choose(true, true);
    EXPECT_FALSE(turn == Turn::train && last == Turn::train) << "a sample waited for two micro-batches";
    (turn == Turn::train ? train : sample) += turn == Turn::train ? micro_batch : step;
    turns.spent(turn, turn == Turn::train ? micro_batch : step);
    last = turn;
  }
  return {train, sample};
}

TEST(Turns, TimeIsSharedAsAsked) {
  const auto [train, sample] = compete(0.5, 1.0, 0.05, 2000);
  EXPECT_NEAR(sample / (train + sample), 0.5, 0.03);
  const auto [train_much, sample_little] = compete(0.2, 1.0, 0.05, 2000);
  EXPECT_NEAR(sample_little / (train_much + sample_little), 0.2, 0.03);
}

TEST(Turns, LongStepsDoNotStarveTraining) {
  const auto [train, sample] = compete(0.5, 0.05, 1.0, 200);
  EXPECT_NEAR(train, 100 * 0.05, 0.2);
  EXPECT_GT(sample, 0);
}

TEST(Turns, WhoIsAloneGetsEveryTurnAndOwesNothing) {
  Turns turns(0.5);
  EXPECT_EQ(turns.choose(false, false), Turn::none);
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(turns.choose(false, true), Turn::sample);
    turns.spent(Turn::sample, 1.0);
  }
  EXPECT_EQ(turns.choose(true, true), Turn::train);
  turns.spent(Turn::train, 0.1);
  EXPECT_EQ(turns.choose(true, true), Turn::sample);
}

TEST(Turns, ALongMicroBatchLetsSamplingThrough) {
  const Turns turns(0.5);
  EXPECT_EQ(turns.sampling_due_inside(0.01), 0);
  EXPECT_DOUBLE_EQ(turns.sampling_due_inside(0.2), 0.2);
}

}  // namespace
}  // namespace ht::scheduler
