// The executors with a tiny random checkpoint, in this process, where a step can be made to fail.

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>

#include "base/error.h"
#include "engine/runtime/test_checkpoint.h"
#include "worker/sample_executor.h"
#include "worker/train_executor.h"

namespace ht::worker {
namespace {

namespace wp = worker_protocol;
using wp::RequestId;

class ExecutorTest : public testing::Test {
 protected:
  void SetUp() override {
    engine::write_test_checkpoint(dir.path());
    model = engine::BaseModel::load(dir.path(), {.threads = 1});
    versions = std::make_unique<Versions>(model->spec(), "base", std::uint64_t{1} << 30);
  }
  Send into_replies() {
    return [this](const wp::Reply& reply) { replies[reply.id].push_back(reply); };
  }
  template <class T>
  T done(RequestId id) {
    EXPECT_EQ(replies[id].size(), 1u);
    const wp::Reply& reply = replies.at(id).at(0);
    if (const auto* failure = std::get_if<wp::Failure>(&reply.body)) throw std::runtime_error(failure->message);
    return std::get<T>(std::get<wp::Done>(reply.body).body);
  }
  wp::Failure failure(RequestId id) {
    EXPECT_EQ(replies[id].size(), 1u);
    return std::get<wp::Failure>(replies.at(id).at(0).body);
  }
  engine::AdapterWeights weights() const {
    engine::AdapterWeights made = engine::Adapter::create(model->spec(), {.rank = 8, .seed = 3}).weights;
    made.flat.copy_(at::cos(at::arange(made.flat.numel(), at::kFloat)) * 0.05);
    return made;
  }

  const c10::InferenceMode no_autograd;
  engine::TemporaryDirectory dir;
  std::unique_ptr<engine::BaseModel> model;
  std::unique_ptr<Versions> versions;
  std::map<RequestId, std::vector<wp::Reply>> replies;
};

class SampleExecutorTest : public ExecutorTest {
 protected:
  std::unique_ptr<SampleExecutor> executor(std::int32_t num_blocks = 32) {
    SampleOptions options;
    options.limits = {.num_blocks = num_blocks, .block_size = 4};
    options.max_seq_len = 128;
    return std::make_unique<SampleExecutor>(*model, *versions, options, into_replies());
  }
  void run(SampleExecutor& sampler, RequestId id, wp::Sample sample) {
    sampler.push({id, std::move(sample)});
    while (sampler.ready()) sampler.run_slice();
  }
  static wp::Sample sample(const std::string& version, int max_tokens = 6) {
    wp::Sample request;
    request.version = version;
    for (int i = 0; i < 18; ++i) request.prompt.push_back((i * 7 + 3) % 31);
    request.num_samples = 2;
    request.params.max_tokens = max_tokens;
    request.params.seed = 11;
    request.params.stop_on_eos = false;
    return request;
  }
  // What comes of version "v" after it failed as `broken`, beside what comes when it never did.
  void expect_a_clean_retry(engine::AdapterWeights broken) {
    const auto sampler = executor();
    versions->publish("v", std::move(broken), "");
    run(*sampler, 1, sample("v"));
    EXPECT_FALSE(failure(1).message.empty());
    EXPECT_EQ(sampler->queue().num_free_blocks(), 32);
    versions->publish("v", weights(), "");
    run(*sampler, 2, sample("v"));
    const auto retried = done<wp::SampleResult>(2);
    EXPECT_EQ(retried.prompt_cache_hit_tokens, 0);
    run(*executor(), 3, sample("v"));
    EXPECT_EQ(retried, done<wp::SampleResult>(3));
  }
};

TEST_F(SampleExecutorTest, AStepThatThrowsLeavesNothingInTheCache) {
  engine::AdapterWeights broken = weights();
  broken.flat = broken.flat.narrow(0, 0, 8).clone();
  expect_a_clean_retry(std::move(broken));
}

TEST_F(SampleExecutorTest, ADivergedAdapterLeavesNothingInTheCache) {
  engine::AdapterWeights broken = weights();
  broken.flat.fill_(std::numeric_limits<float>::quiet_NaN());
  expect_a_clean_retry(std::move(broken));
}

TEST_F(SampleExecutorTest, AFailedStepEndsItsOwnRequestsAlone) {
  const auto sampler = executor();
  engine::AdapterWeights broken = weights();
  broken.flat = broken.flat.narrow(0, 0, 8).clone();
  versions->publish("bad", std::move(broken), "");
  sampler->push({1, sample("bad")});
  sampler->run_slice();
  EXPECT_FALSE(failure(1).message.empty());
  EXPECT_FALSE(sampler->ready());
  run(*sampler, 2, sample(""));
  EXPECT_EQ(done<wp::SampleResult>(2).sequences[1].tokens.size(), 6u);
  EXPECT_EQ(sampler->queue().num_free_blocks(), 32);
}

TEST_F(SampleExecutorTest, OpenMaxTokensEndWhereCacheAndContextEnd) {
  const auto small = executor(8);  // 32 positions
  run(*small, 1, sample("", 0));
  // The last token takes no place.
  EXPECT_EQ(done<wp::SampleResult>(1).sequences[0].tokens.size(), 32u - 18u + 1u);
  run(*small, 2, sample("", 16));
  EXPECT_THAT(failure(2).message, testing::HasSubstr("kv_cache_tokens"));
  run(*executor(128), 3, sample("", 0));
  EXPECT_EQ(done<wp::SampleResult>(3).sequences[1].tokens.size(), 128u - 18u);
}

class TrainExecutorTest : public ExecutorTest {
 protected:
  void SetUp() override {
    ExecutorTest::SetUp();
    trainer = std::make_unique<TrainExecutor>(*model, *versions, TrainOptions{20, 128, "base"}, into_replies());
  }
  static wp::ForwardBackward batch(const std::string& adapter, int datums, int salt) {
    wp::ForwardBackward request;
    request.adapter = adapter;
    request.batch.cu_seqlens.push_back(0);
    for (int i = 0; i < datums; ++i) {
      for (int t = 0; t < 10; ++t) {
        request.batch.tokens.push_back((i * 5 + t * 3 + salt) % 31);
        request.batch.targets.push_back((i * 5 + (t + 1) * 3 + salt) % 31);
        request.batch.weights.push_back(1.0f);
      }
      request.batch.cu_seqlens.push_back(static_cast<std::int32_t>(request.batch.tokens.size()));
      request.batch.target_width.push_back(1);
    }
    return request;
  }
  void push(RequestId id, wp::RequestBody body) { trainer->push({id, std::move(body)}); }
  // `failing`: the number of the micro-batch that throws between two blocks.
  void run_all(std::uint64_t failing = 0) {
    while (trainer->ready()) {
      trainer->run_slice([&] {
        if (trainer->micro_batches() + 1 == failing) throw std::runtime_error("injected");
      });
    }
  }
  double grad_norm(RequestId id) { return done<wp::OptimResult>(id).metrics.at("grad_norm"); }

  std::unique_ptr<TrainExecutor> trainer;
};

TEST_F(TrainExecutorTest, ARequestThatFailsHalfwayLeavesTheGradientAsItWas) {
  for (const char* name : {"a", "control"}) push(name[0], wp::CreateAdapter{name, {.rank = 8, .seed = 3}, "", false});
  run_all();
  // A single datum, and a request whose first datum shares its micro-batch.
  push(1, batch("a", 1, 0));
  push(2, batch("a", 5, 1));
  run_all(2);
  done<wp::TrainResult>(1);
  EXPECT_THAT(failure(2).message, testing::HasSubstr("injected"));
  EXPECT_EQ(trainer->micro_batches(), 1u);
  push(3, wp::OptimStep{"a", {}});
  push(4, batch("control", 1, 0));
  push(5, wp::OptimStep{"control", {}});
  run_all();
  EXPECT_NEAR(grad_norm(3), grad_norm(5), 1e-5 * grad_norm(5));
}

TEST_F(TrainExecutorTest, SeveralMicroBatchesGiveTheGradientOfOne) {
  for (const char* name : {"a", "control"}) push(name[0], wp::CreateAdapter{name, {.rank = 8, .seed = 3}, "", false});
  run_all();
  push(1, batch("a", 1, 0));
  push(2, batch("a", 5, 1));
  push(3, batch("a", 2, 7));
  push(4, wp::OptimStep{"a", {}});
  run_all();
  EXPECT_GT(trainer->micro_batches(), 3u);
  trainer = std::make_unique<TrainExecutor>(*model, *versions, TrainOptions{2000, 128, "base"}, into_replies());
  push(10, wp::CreateAdapter{"a", {.rank = 8, .seed = 3}, "", false});
  push(11, batch("a", 1, 0));
  push(12, batch("a", 5, 1));
  push(13, batch("a", 2, 7));
  push(14, wp::OptimStep{"a", {}});
  run_all();
  EXPECT_EQ(trainer->micro_batches(), 1u);
  EXPECT_NEAR(grad_norm(4), grad_norm(14), 1e-5 * grad_norm(14));
}

}  // namespace
}  // namespace ht::worker
