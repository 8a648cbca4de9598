#include "scheduler/train_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "base/error.h"

namespace ht::scheduler {
namespace {

TrainRequest batch(RequestId id, const std::string& adapter, std::vector<std::int32_t> tokens,
                   bool forward_only = false) {
  return {id, adapter, true, forward_only, std::move(tokens)};
}
TrainRequest op(RequestId id, const std::string& adapter) {
  return {id, adapter, false, false, {}};
}

// Runs everything that is ready.
std::vector<TrainPlan> run_all(TrainQueue& queue) {
  std::vector<TrainPlan> plans;
  while (queue.ready()) {
    plans.push_back(queue.next());
    if (plans.back().kind == TrainPlan::Kind::none) ADD_FAILURE() << "ready, but nothing to do";
  }
  EXPECT_EQ(queue.next().kind, TrainPlan::Kind::none);
  return plans;
}
std::vector<TrainMicroBatch> micro_batches(const std::vector<TrainPlan>& plans) {
  std::vector<TrainMicroBatch> found;
  for (const TrainPlan& plan : plans) {
    if (plan.kind == TrainPlan::Kind::micro_batch) found.push_back(plan.micro_batch);
  }
  return found;
}

TEST(TrainQueue, SmallCallsOfThreeAdaptersShareMicroBatches) {
  TrainQueue queue(2048);
  RequestId id = 1;
  for (const std::string adapter : {"a", "b", "c"}) {
    queue.set_live(adapter, true);
    for (int call = 0; call < 8; ++call) {
      queue.push(batch(id++, adapter, {40, 50}));
      queue.push(op(id++, adapter));
    }
  }
  // Serial execution takes 24; an optimizer step between two calls of an adapter keeps those two apart.
  EXPECT_EQ(micro_batches(run_all(queue)).size(), 8u);
  EXPECT_EQ(queue.size(), 0u);
}

TEST(TrainQueue, ConsecutiveCallsOfOneAdapterMergeUpToTheBudget) {
  TrainQueue queue(100);
  queue.set_live("a", true);
  queue.push(batch(1, "a", {60}));
  queue.push(batch(2, "a", {30, 20}));
  queue.push(batch(3, "a", {500}));
  const auto composed = micro_batches(run_all(queue));
  ASSERT_EQ(composed.size(), 3u);
  EXPECT_THAT(composed[0].slices, testing::ElementsAre(TrainSlice{1, 0, 1}, TrainSlice{2, 0, 1}));
  EXPECT_THAT(composed[1].slices, testing::ElementsAre(TrainSlice{2, 1, 2}));
  EXPECT_THAT(composed[2].slices, testing::ElementsAre(TrainSlice{3, 0, 1}));
  EXPECT_LT(composed[0].number, composed[1].number);
}

TEST(TrainQueue, ForwardAndBackwardNeverShareAMicroBatch) {
  TrainQueue queue(1000);
  queue.set_live("a", true);
  queue.set_live("b", true);
  queue.push(batch(1, "a", {10}));
  queue.push(batch(2, "a", {10}, true));
  queue.push(batch(3, "b", {10}, true));
  const auto composed = micro_batches(run_all(queue));
  ASSERT_EQ(composed.size(), 2u);
  EXPECT_FALSE(composed[0].forward_only);
  EXPECT_TRUE(composed[1].forward_only);
  EXPECT_EQ(composed[1].slices.size(), 2u);
}

TEST(TrainQueue, AHugeRequestLeavesRoomForASmallOne) {
  TrainQueue queue(100);
  queue.set_live("a", true);
  queue.set_live("b", true);
  queue.push(batch(1, "a", std::vector<std::int32_t>(50, 50)));
  queue.push(batch(2, "b", {90}));
  // "b" does not fit beside the first datum of "a", so it begins the next micro-batch.
  EXPECT_EQ(queue.next().micro_batch.slices.front().request, 1u);
  EXPECT_EQ(queue.next().micro_batch.slices.front().request, 2u);
}

TEST(TrainQueue, BatchesOfAnUnknownAdapterAreRefused) {
  TrainQueue queue(100);
  queue.push(batch(1, "a", {10}));
  const TrainPlan plan = queue.next();
  EXPECT_EQ(plan.kind, TrainPlan::Kind::refused);
  EXPECT_EQ(plan.request, 1u);
  EXPECT_EQ(queue.size(), 0u);
}

TEST(TrainQueue, AnAdapterThatIsHeldHoldsUpNobodyElse) {
  TrainQueue queue(100);
  for (const char* adapter : {"a", "b"}) queue.set_live(adapter, true);
  queue.push(batch(1, "a", {10}));
  queue.push(op(2, "a"));
  queue.push(batch(3, "b", {10}));
  queue.set_replay({{.number = 7, .slices = {{3, 0, 1}}}, {.number = 8, .slices = {{1, 0, 1}}}});
  queue.hold("a");
  queue.hold("a");
  EXPECT_THAT(micro_batches(run_all(queue)), testing::SizeIs(1));
  queue.release("a");
  EXPECT_FALSE(queue.ready());
  queue.release("a");
  const auto plans = run_all(queue);
  ASSERT_EQ(plans.size(), 2u);
  EXPECT_EQ(plans[0].micro_batch.number, 8u);
  EXPECT_EQ(plans[1].request, 2u);
}

TEST(TrainQueue, AClientThatSendsOpsAloneDoesNotKeepTheOthersWaiting) {
  TrainQueue queue(100);
  queue.set_live("b", true);
  for (RequestId id = 1; id <= 100; ++id) queue.push(op(id, "a"));
  queue.push(batch(200, "b", {10}));
  int before = 0;
  while (queue.next().kind != TrainPlan::Kind::micro_batch) ++before;
  EXPECT_LE(before, 8);
}

TEST(TrainQueue, DrainingHoldsBackLongRequestsAlone) {
  TrainQueue queue(100);
  for (const char* adapter : {"a", "b", "c"}) queue.set_live(adapter, true);
  queue.push(batch(1, "a", {60, 60, 60}));
  queue.push(op(2, "a"));
  queue.push(batch(3, "b", {60, 60}));
  ASSERT_EQ(queue.next().micro_batch.slices, (std::vector{TrainSlice{1, 0, 1}}));
  EXPECT_FALSE(queue.drained());
  queue.set_draining(true);
  queue.push(batch(4, "c", {20, 20}));
  queue.push(op(5, "c"));
  queue.push(batch(6, "c", {500}));
  int before_the_end = 0;
  while (queue.ready()) {
    const TrainPlan plan = queue.next();
    for (const TrainSlice& slice : plan.micro_batch.slices) EXPECT_NE(slice.request, 3u);
    if (!queue.drained() && (plan.request == 5 || plan.kind == TrainPlan::Kind::micro_batch)) ++before_the_end;
  }
  EXPECT_GE(before_the_end, 2) << "the others did not run while the request of a was under way";
  EXPECT_TRUE(queue.drained());
  EXPECT_EQ(queue.size(), 1u);
  queue.set_draining(false);
  run_all(queue);
  EXPECT_EQ(queue.size(), 0u);
}

TEST(TrainQueue, DrainingDoesNotHoldAnybodyBackUntilAVeryLongRequestEnds) {
  TrainQueue queue(100);
  queue.set_live("a", true);
  queue.set_live("b", true);
  queue.push(batch(1, "a", std::vector<std::int32_t>(1000, 60)));
  queue.next();
  queue.set_draining(true);
  for (RequestId id = 2; id < 200; ++id) queue.push(batch(id, "b", {60, 60, 60}));
  int longest_wait = 0, wait = 0, of_b = 0;
  while (queue.ready() && queue.size() > 150) {
    const bool b = queue.next().micro_batch.slices.front().request != 1;
    wait = b ? 0 : wait + 1;
    of_b += b;
    longest_wait = std::max(longest_wait, wait);
  }
  EXPECT_GE(of_b, 140);
  EXPECT_LE(longest_wait, 300);
}

TEST(TrainQueue, DrainingComesToAnEndAmongRequestsThatOverlap) {
  TrainQueue queue(100);
  queue.set_live("a", true);
  queue.set_live("b", true);
  RequestId id = 1;
  const auto feed = [&] {
    while (queue.size() < 6) {
      const bool a = id % 2 == 1;
      queue.push(batch(id++, a ? "a" : "b", std::vector<std::int32_t>(a ? 150 : 157, 60)));
    }
  };
  feed();
  queue.next();
  queue.next();
  queue.set_draining(true);
  int micro_batches = 0;
  for (; !queue.drained(); feed()) {
    queue.next();
    ASSERT_LT(++micro_batches, 3000);
  }
}

TEST(TrainQueue, AReplayThatDoesNotFitIsAnErrorAndCanBeGivenUp) {
  TrainQueue queue(100);
  queue.set_live("a", true);
  queue.set_replay({{7, false, {{1, 1, 2}}}});
  queue.push(batch(1, "a", {10, 10}));
  EXPECT_THROW(queue.next(), Error);
  queue.clear_replay();
  EXPECT_EQ(queue.next().micro_batch.number, 8u);
}

struct RandomLoad {
  std::vector<TrainRequest> requests;  // in order of sending
  std::set<std::string> adapters;
};
RandomLoad random_load(std::mt19937& random) {
  RandomLoad load;
  const int adapters = 1 + static_cast<int>(random() % 4);
  RequestId id = 1;
  for (int i = 0; i < 60; ++i) {
    const std::string adapter(1, static_cast<char>('a' + random() % adapters));
    load.adapters.insert(adapter);
    if (random() % 3 == 0) {
      load.requests.push_back(op(id++, adapter));
      continue;
    }
    std::vector<std::int32_t> tokens(1 + random() % 6);
    for (std::int32_t& n : tokens) n = 1 + static_cast<std::int32_t>(random() % 120);
    load.requests.push_back(batch(id++, adapter, tokens, random() % 4 == 0));
  }
  return load;
}

// Every datum exactly once and in order, ops in order between them, within the budget, adapters adjacent.
TEST(TrainQueue, RandomLoadsRunInOrderOnceAndReplayEqually) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const RandomLoad load = random_load(random);
    TrainQueue queue(256);
    for (const std::string& adapter : load.adapters) queue.set_live(adapter, true);
    std::map<RequestId, const TrainRequest*> by_id;
    std::map<std::string, std::vector<RequestId>> expected, executed;
    std::vector<TrainPlan> plans;
    for (const TrainRequest& request : load.requests) {
      by_id[request.id] = &request;
      for (std::size_t i = 0; i < std::max<std::size_t>(1, request.datum_tokens.size()); ++i)
        expected[request.adapter].push_back(request.id);
      queue.push(request);
      if (random() % 4 == 0) plans.push_back(queue.next());
    }
    for (TrainPlan& plan : run_all(queue)) plans.push_back(std::move(plan));
    for (const TrainPlan& plan : plans) {
      if (plan.kind == TrainPlan::Kind::op) executed[by_id[plan.request]->adapter].push_back(plan.request);
      std::int64_t tokens = 0, datums = 0;
      std::vector<std::string> adapters;
      for (const TrainSlice& slice : plan.micro_batch.slices) {
        const TrainRequest& request = *by_id[slice.request];
        EXPECT_EQ(request.forward_only, plan.micro_batch.forward_only);
        if (adapters.empty() || adapters.back() != request.adapter) adapters.push_back(request.adapter);
        for (int datum = slice.datum_begin; datum < slice.datum_end; ++datum, ++datums) {
          tokens += request.datum_tokens.at(static_cast<std::size_t>(datum));
          executed[request.adapter].push_back(request.id);
        }
      }
      EXPECT_TRUE(datums <= 1 || tokens <= 256);
      EXPECT_EQ(std::set<std::string>(adapters.begin(), adapters.end()).size(), adapters.size());
    }
    EXPECT_EQ(executed, expected) << "seed " << seed;

    // The same requests in another timing, with the record: the same micro-batches.
    TrainQueue again(512);
    for (const std::string& adapter : load.adapters) again.set_live(adapter, true);
    again.set_replay(micro_batches(plans));
    std::vector<TrainPlan> replayed;
    for (const TrainRequest& request : load.requests) {
      again.push(request);
      while (again.ready()) replayed.push_back(again.next());
    }
    const auto first = micro_batches(plans), second = micro_batches(replayed);
    ASSERT_EQ(first.size(), second.size()) << "seed " << seed;
    for (std::size_t i = 0; i < first.size(); ++i) {
      EXPECT_EQ(first[i].slices, second[i].slices);
      EXPECT_EQ(first[i].number, second[i].number);
      EXPECT_EQ(first[i].forward_only, second[i].forward_only);
    }
  }
}

}  // namespace
}  // namespace ht::scheduler
