#include "worker/sample_executor.h"

#include "worker/executor_test.h"

namespace ht::worker {
namespace {

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

TEST_F(SampleExecutorTest, OnlySamplesOfAColdVersionWaitForItsFiles) {
  const auto dir = make_dir("v"), slow = make_dir("slow");
  engine::save_adapter_weights(weights(), "base", dir);
  std::filesystem::copy_file(dir / "adapter_config.json", slow / "adapter_config.json");
  ASSERT_EQ(::mkfifo((slow / "adapter_model.safetensors").c_str(), 0600), 0);
  const auto sampler = executor();
  wp::Sample cold = sample("cold");
  cold.version_dir = slow;
  sampler->push({1, cold});
  run(*sampler, 2, sample(""));
  EXPECT_EQ(done<wp::SampleResult>(2).sequences[0].tokens.size(), 6u);
  EXPECT_FALSE(replies.contains(1));
  EXPECT_FALSE(sampler->ready());
  // What comes at last is no adapter.
  std::ofstream(slow / "adapter_model.safetensors").close();
  pump_until_answered(1);
  EXPECT_THAT(failure(1).message, testing::HasSubstr("adapter_model.safetensors"));
  cold.version_dir = dir;
  sampler->push({3, cold});
  sampler->run_slice();
  pump([&] { return sampler->ready(); });
  while (sampler->ready()) sampler->run_slice();
  const auto from_disk = done<wp::SampleResult>(3);
  versions->publish("v", weights(), "");
  run(*executor(), 4, sample("v"));
  EXPECT_EQ(from_disk.sequences[1].tokens, done<wp::SampleResult>(4).sequences[1].tokens);
}

TEST_F(SampleExecutorTest, ColdVersionsLeaveMemoryAndComeBack) {
  const auto one = static_cast<std::uint64_t>(weights().flat.nbytes());
  make_versions(2 * one);
  const auto sampler = executor();
  const auto dir = make_dir("v");
  engine::save_adapter_weights(weights(), "base", dir);
  // All at once, and far more of them than memory and rows for.
  for (RequestId id = 1; id <= 40; ++id) {
    wp::Sample request = sample("checkpoint " + std::to_string(id % 20));
    request.version_dir = dir;
    request.owner = std::to_string(id % 3);
    sampler->push({id, std::move(request)});
  }
  std::uint64_t most = 0;
  while (replies.size() < 40) {
    while (sampler->ready()) {
      sampler->run_slice();
      most = std::max(most, versions->bytes_in_memory());
    }
    if (replies.size() < 40) {
      for (const FileThread::Then& then : mailbox.take(true).files) then();
    }
  }
  EXPECT_LE(most, (2 + 4) * one);  // those being read come on top
  EXPECT_LE(versions->bytes_in_memory(), 2 * one);
  EXPECT_TRUE(versions->on_disk().empty());  // not ours: no snapshot names them
  for (RequestId id = 2; id <= 40; ++id) {
    for (const std::size_t i : {0u, 1u}) {
      EXPECT_EQ(done<wp::SampleResult>(id).sequences[i].tokens, done<wp::SampleResult>(1).sequences[i].tokens) << id;
    }
  }
}

}  // namespace
}  // namespace ht::worker
