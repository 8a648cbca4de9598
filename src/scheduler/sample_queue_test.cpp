#include "scheduler/sample_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "base/error.h"

namespace ht::scheduler {
namespace {

// A model of the engine: a cache of tokens, and a "next token" that is a function of all tokens before it, read through
// the block table. Wrong sharing, a missing copy or a stale block changes what is drawn.
class FakeEngine {
 public:
  explicit FakeEngine(const SampleLimits& limits)
      : limits_(limits), cells_(static_cast<std::size_t>(limits.num_blocks * limits.block_size), -1) {}

  static std::int32_t next_token(const std::vector<std::int32_t>& tokens, std::int32_t sample) {
    std::uint32_t hash = 17u + static_cast<std::uint32_t>(sample);
    for (const std::int32_t token : tokens) hash = (hash ^ static_cast<std::uint32_t>(token)) * 0x01000193u;
    return static_cast<std::int32_t>(hash % 1000);
  }

  std::vector<std::vector<std::int32_t>> run(const SampleStep& step) {
    for (const BlockCopy& copy : step.copies) {
      for (int i = 0; i < limits_.block_size; ++i) cell(copy.to, i) = cell(copy.from, i);
    }
    for (const SampleRow& row : step.rows) {
      for (std::size_t i = 0; i < row.tokens.size(); ++i) {
        const int position = row.position + static_cast<int>(i);
        cell(row.block_table.at(static_cast<std::size_t>(position / limits_.block_size)),
             position % limits_.block_size) = row.tokens[i];
      }
    }
    std::vector<std::vector<std::int32_t>> draws;
    for (const SampleRow& row : step.rows) {
      std::vector<std::int32_t> tokens;
      for (int p = 0; p < row.position + static_cast<int>(row.tokens.size()); ++p)
        tokens.push_back(
            cell(row.block_table.at(static_cast<std::size_t>(p / limits_.block_size)), p % limits_.block_size));
      draws.emplace_back();
      for (const std::int32_t sample : row.draws) draws.back().push_back(next_token(tokens, sample));
    }
    return draws;
  }

 private:
  std::int32_t& cell(BlockId block, int offset) {
    return cells_.at(static_cast<std::size_t>(block * limits_.block_size + offset));
  }
  SampleLimits limits_;
  std::vector<std::int32_t> cells_;
};

class Sampler {
 public:
  explicit Sampler(const SampleLimits& limits) : queue(limits), engine(limits), limits_(limits) {}

  void push(const SampleRequest& request) {
    queue.push(request);
    requests[request.id] = request;
    outputs[request.id].resize(static_cast<std::size_t>(request.num_samples));
  }
  // False: nothing ran.
  bool step() {
    last = queue.next_step();
    if (last.rows.empty()) return false;
    std::int32_t decode_rows = 0, prefill_tokens = 0;
    for (const SampleRow& row : last.rows) {
      (row.tokens.size() == 1 && !row.draws.empty() && !row.is_prompt ? decode_rows : prefill_tokens) +=
          static_cast<std::int32_t>(row.tokens.size());
      computed_tokens += static_cast<std::int64_t>(row.tokens.size());
    }
    EXPECT_LE(prefill_tokens, limits_.prefill_chunk_tokens);
    EXPECT_LE(decode_rows, limits_.max_sequences + limits_.prefill_chunk_tokens);
    const auto tokens = engine.run(last);
    std::vector<std::vector<SampleDraw>> draws;
    for (std::size_t i = 0; i < last.rows.size(); ++i) {
      draws.emplace_back();
      for (std::size_t d = 0; d < last.rows[i].draws.size(); ++d) {
        const SampleRequest& request = requests.at(last.rows[i].request);
        auto& output = outputs[request.id][static_cast<std::size_t>(last.rows[i].draws[d])];
        output.push_back(tokens[i][d]);
        draws.back().push_back({tokens[i][d], std::ssize(output) == request.max_tokens});
      }
    }
    queue.complete(last, draws);
    return true;
  }
  void check(RequestId id) const {
    const SampleRequest& request = requests.at(id);
    for (std::int32_t sample = 0; sample < request.num_samples; ++sample) {
      std::vector<std::int32_t> tokens = request.prompt, expected;
      for (int i = 0; i < request.max_tokens; ++i) {
        expected.push_back(FakeEngine::next_token(tokens, sample));
        tokens.push_back(expected.back());
      }
      EXPECT_EQ(outputs.at(id)[static_cast<std::size_t>(sample)], expected) << "request " << id << " sample " << sample;
    }
  }

  SampleQueue queue;
  FakeEngine engine;
  SampleStep last;
  std::map<RequestId, SampleRequest> requests;
  std::map<RequestId, std::vector<std::vector<std::int32_t>>> outputs;
  std::int64_t computed_tokens = 0;

 private:
  SampleLimits limits_;
};

std::vector<std::int32_t> prompt(int length, int salt = 0) {
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < length; ++i) tokens.push_back(i * 7 + salt);
  return tokens;
}

TEST(SampleQueue, SamplesShareThePromptAndPartByCopyOnWrite) {
  Sampler sampler({.num_blocks = 64, .block_size = 4});
  sampler.push({.id = 1, .version = "v", .prompt = prompt(10), .num_samples = 5, .max_tokens = 9});
  ASSERT_TRUE(sampler.step());
  EXPECT_EQ(sampler.last.rows.size(), 1u);
  EXPECT_THAT(sampler.last.rows[0].draws, testing::ElementsAre(0, 1, 2, 3, 4));
  ASSERT_TRUE(sampler.step());
  EXPECT_EQ(sampler.last.rows.size(), 5u);
  EXPECT_EQ(sampler.last.copies.size(), 4u);  // the last one keeps the prompt's block
  while (sampler.step()) {
  }
  sampler.check(1);
  EXPECT_EQ(sampler.queue.num_free_blocks(), 64);
  EXPECT_FALSE(sampler.queue.cancel(1));
}

TEST(SampleQueue, APromptIsComputedOnceForRequestsInFlightAndAfter) {
  Sampler sampler({.num_blocks = 64, .block_size = 4, .prefill_chunk_tokens = 8});
  for (RequestId id = 1; id <= 3; ++id) sampler.push({.id = id, .version = "v", .prompt = prompt(41), .max_tokens = 1});
  while (sampler.step()) {
  }
  EXPECT_EQ(sampler.computed_tokens, 41 + 1 + 1);
  sampler.push({.id = 4, .version = "w", .prompt = prompt(41), .max_tokens = 1});  // another version: other keys
  while (sampler.step()) {
  }
  EXPECT_EQ(sampler.computed_tokens, 43 + 41);
  sampler.push({.id = 5, .version = "v", .prompt = prompt(41), .max_tokens = 1, .score_begin = 30});
  ASSERT_TRUE(sampler.step());
  EXPECT_EQ(sampler.last.rows[0].position, 28);  // whole blocks before the first scored row
  while (sampler.step()) {
  }
  sampler.queue.drop_version("v");
  sampler.push({.id = 6, .version = "v", .prompt = prompt(41), .max_tokens = 1});
  ASSERT_TRUE(sampler.step());
  EXPECT_EQ(sampler.last.rows[0].position, 0);
  while (sampler.step()) {
  }
  for (RequestId id = 1; id <= 6; ++id) sampler.check(id);
}

TEST(SampleQueue, ALongPromptDoesNotHoldUpDecoding) {
  Sampler sampler({.num_blocks = 64, .block_size = 4, .prefill_chunk_tokens = 16});
  sampler.push({.id = 1, .version = "v", .prompt = prompt(5), .max_tokens = 20});
  sampler.step();
  sampler.push({.id = 2, .version = "v", .prompt = prompt(100, 3), .max_tokens = 2});
  for (int i = 0; i < 6; ++i) {
    ASSERT_TRUE(sampler.step());
    EXPECT_EQ(sampler.last.rows.size(), 2u);
  }
  EXPECT_EQ(sampler.outputs[1][0].size(), 7u);
}

TEST(SampleQueue, PreemptedSequencesGiveTheSameTokens) {
  Sampler sampler({.num_blocks = 9, .block_size = 4});
  sampler.push({.id = 1, .version = "v", .prompt = prompt(6), .num_samples = 3, .max_tokens = 25});
  sampler.push({.id = 2, .version = "v", .prompt = prompt(7, 1), .num_samples = 2, .max_tokens = 20});
  while (sampler.step()) {
  }
  EXPECT_GT(sampler.queue.num_preemptions(), 0u);
  sampler.check(1);
  sampler.check(2);
  EXPECT_EQ(sampler.queue.num_free_blocks(), 9);
}

TEST(SampleQueue, WhatCanNeverFitIsRefusedByName) {
  SampleQueue queue({.num_blocks = 4, .block_size = 4});
  queue.push({.id = 1, .version = "v", .prompt = prompt(10), .max_tokens = 7});
  try {
    queue.push({.id = 2, .version = "v", .prompt = prompt(10), .max_tokens = 8});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
    EXPECT_THAT(error.what(), testing::AllOf(testing::HasSubstr("16 tokens"), testing::HasSubstr("kv_cache_tokens")));
  }
  EXPECT_THROW(queue.push({.id = 3, .version = "v", .prompt = {}}), Error);
}

TEST(SampleQueue, NothingOfAFailedStepIsCached) {
  const SampleLimits limits{.num_blocks = 16, .block_size = 4};
  Sampler sampler(limits);
  sampler.push({.id = 1, .version = "v", .prompt = prompt(13), .max_tokens = 3});
  const SampleStep failed = sampler.queue.next_step();  // never run
  sampler.queue.cancel(1);
  sampler.queue.complete(failed, std::vector<std::vector<SampleDraw>>(failed.rows.size()));
  EXPECT_EQ(sampler.queue.num_free_blocks(), limits.num_blocks);
  sampler.push({.id = 2, .version = "v", .prompt = prompt(13), .max_tokens = 3});
  while (sampler.step()) {
  }
  sampler.check(2);
}

// Steps until request `id` has all of its tokens.
int steps_until(Sampler& sampler, RequestId id) {
  int steps = 0;
  const auto& outputs = sampler.outputs.at(id);
  while (std::ssize(outputs[0]) < sampler.requests.at(id).max_tokens && sampler.step()) ++steps;
  return steps;
}

TEST(SampleQueue, ManySamplesOfOneRequestDoNotKeepAnotherOwnerWaiting) {
  Sampler sampler({.num_blocks = 400, .block_size = 4, .max_sequences = 4});
  sampler.push({.id = 1, .owner = "a", .version = "v", .prompt = prompt(10), .num_samples = 40, .max_tokens = 30});
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(sampler.step());
  ASSERT_EQ(sampler.queue.num_running(), 40);
  sampler.push({.id = 2, .owner = "b", .version = "v", .prompt = prompt(10, 1), .max_tokens = 6});
  EXPECT_EQ(steps_until(sampler, 2), 6);
  EXPECT_EQ(sampler.outputs.at(1)[39].size(), 1u);
  while (sampler.step()) {
  }
  sampler.check(1);
  sampler.check(2);
}

TEST(SampleQueue, ManyQueuedRequestsDoNotKeepAnotherOwnerWaiting) {
  Sampler sampler({.num_blocks = 400, .block_size = 4, .max_sequences = 4});
  for (RequestId id = 1; id <= 300; ++id) {
    sampler.push({.id = id, .owner = "a", .version = "v", .prompt = prompt(10), .max_tokens = 30});
  }
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(sampler.step());
  ASSERT_EQ(sampler.queue.num_running(), 4);
  sampler.push({.id = 301, .owner = "b", .version = "v", .prompt = prompt(10, 1), .max_tokens = 6});
  EXPECT_EQ(steps_until(sampler, 301), 6);
  // b has its share, half of the rows, and not more.
  for (RequestId id = 302; id <= 310; ++id) {
    sampler.push({.id = id, .owner = "b", .version = "v", .prompt = prompt(10, 1), .max_tokens = 30});
  }
  for (int i = 0; i < 40; ++i) ASSERT_TRUE(sampler.step());
  std::map<std::string, int> rows;
  for (const SampleRow& row : sampler.last.rows) ++rows[sampler.requests.at(row.request).owner];
  EXPECT_EQ(rows, (std::map<std::string, int>{{"a", 2}, {"b", 2}}));
}

TEST(SampleQueue, ACacheFullOfOneOwnersSequencesHasRoomForAnother) {
  Sampler sampler({.num_blocks = 12, .block_size = 4, .max_sequences = 8});
  for (RequestId id = 1; id <= 20; ++id) {
    sampler.push({.id = id, .owner = "a", .version = "v", .prompt = prompt(4, static_cast<int>(id)), .max_tokens = 30});
  }
  for (int i = 0; i < 12; ++i) ASSERT_TRUE(sampler.step());
  sampler.push({.id = 21, .owner = "b", .version = "v", .prompt = prompt(4, 50), .max_tokens = 20});
  EXPECT_LE(steps_until(sampler, 21), 60);
  while (sampler.step()) {
  }
  for (RequestId id = 1; id <= 21; ++id) sampler.check(id);
  EXPECT_GT(sampler.queue.num_preemptions(), 0u);
}

TEST(SampleQueue, WhatMayNotStartYetHoldsUpNobody) {
  const SampleLimits limits{.num_blocks = 64, .block_size = 4};
  bool loaded = false;
  int asked = 0;
  SampleQueue queue(limits, [&](RequestId id) {
    if (id == 3) return SampleStart::now;
    ++asked;
    return loaded ? SampleStart::now : SampleStart::released;
  });
  queue.push({.id = 1, .version = "cold", .prompt = prompt(5), .max_tokens = 1});
  queue.push({.id = 2, .version = "cold", .prompt = prompt(6, 1), .max_tokens = 1});
  EXPECT_TRUE(queue.ready());
  EXPECT_TRUE(queue.next_step().rows.empty());
  EXPECT_FALSE(queue.ready());
  EXPECT_EQ(asked, 1);
  queue.push({.id = 3, .version = "v", .prompt = prompt(5), .max_tokens = 1});
  ASSERT_TRUE(queue.ready());
  SampleStep step = queue.next_step();
  ASSERT_EQ(step.rows.size(), 1u);
  EXPECT_EQ(step.rows[0].request, 3u);
  const std::vector<std::vector<SampleDraw>> draws{{{7, true}}};
  queue.complete(step, draws);
  EXPECT_FALSE(queue.ready());
  loaded = true;
  queue.release();
  EXPECT_TRUE(queue.ready());
  step = queue.next_step();
  EXPECT_EQ(step.rows.size(), 2u);
}

TEST(SampleQueue, RandomLoadsWithCancelsLeakNothingAndDrawTheRightTokens) {
  for (unsigned seed = 0; seed < 150; ++seed) {
    std::mt19937 random(seed);
    const SampleLimits limits{.num_blocks = 8 + static_cast<std::int32_t>(random() % 30),
                              .block_size = 1 << (random() % 4),
                              .max_sequences = 1 + static_cast<std::int32_t>(random() % 6),
                              .prefill_chunk_tokens = 1 + static_cast<std::int32_t>(random() % 20)};
    Sampler sampler(limits);
    std::set<RequestId> cancelled;
    RequestId id = 0;
    for (int tick = 0; tick < 120; ++tick) {
      if (random() % 3 == 0) {
        SampleRequest request{.id = ++id,
                              .owner = random() % 2 ? "a" : "b",
                              .version = random() % 2 ? "v" : "w",
                              .prompt = prompt(1 + static_cast<int>(random() % 12), static_cast<int>(random() % 2)),
                              .num_samples = 1 + static_cast<std::int32_t>(random() % 4),
                              .max_tokens = 1 + static_cast<std::int32_t>(random() % 10)};
        if (random() % 3 == 0) request.score_begin = static_cast<std::int32_t>(random() % request.prompt.size());
        try {
          sampler.push(request);
        } catch (const Error&) {
          cancelled.insert(id);
        }
      }
      if (id > 0 && random() % 8 == 0) {
        const RequestId target = 1 + random() % id;
        if (sampler.queue.cancel(target)) cancelled.insert(target);
      }
      sampler.step();
    }
    int steps = 0;
    while (sampler.step()) ASSERT_LT(++steps, 20000) << "seed " << seed;
    EXPECT_FALSE(sampler.queue.ready());
    EXPECT_EQ(sampler.queue.num_free_blocks(), limits.num_blocks) << "seed " << seed;
    for (RequestId r = 1; r <= id; ++r) {
      if (!cancelled.contains(r)) sampler.check(r);
    }
  }
}

}  // namespace
}  // namespace ht::scheduler
