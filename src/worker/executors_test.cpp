// The executors with a tiny random checkpoint, in this process, where a step can be made to fail.

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <memory>
#include <stdexcept>

#include "base/error.h"
#include "engine/runtime/test_checkpoint.h"
#include "model_spec/memory_plan.h"
#include "worker/mailbox.h"
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
    make_versions(std::uint64_t{1} << 30);
  }
  void make_versions(std::uint64_t budget) {
    versions = std::make_unique<Versions>(model->spec(), "base", budget, files);
  }
  // Until `true`, with what comes of files.
  void pump(const std::function<bool()>& until) {
    while (!until()) {
      for (const FileThread::Then& then : mailbox.take(true).files) then();
    }
  }
  void pump_until_answered(RequestId id) {
    pump([&] { return replies.contains(id); });
  }
  std::filesystem::path make_dir(const std::string& name) {
    std::filesystem::create_directory(scratch.path() / name);
    return scratch.path() / name;
  }
  // A file that is opened for writing only once somebody reads it, and cannot be synced then.
  std::filesystem::path slow_file(const std::filesystem::path& file) {
    const std::string path = file.string() + ".tmp." + std::to_string(::getpid());
    EXPECT_EQ(::mkfifo(path.c_str(), 0600), 0);
    return path;
  }
  void read_away(const std::filesystem::path& fifo) {
    std::ifstream stream(fifo);
    while (stream.get() != EOF) continue;
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
  engine::TemporaryDirectory scratch;
  Mailbox mailbox;
  std::map<RequestId, std::vector<wp::Reply>> replies;
  std::unique_ptr<Versions> versions;
  FileThread files{[this](FileThread::Then then) { mailbox.post(std::move(then)); }};
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

class TrainExecutorTest : public ExecutorTest {
 protected:
  void SetUp() override {
    ExecutorTest::SetUp();
    make_trainer({20, 128, "base"});
  }
  void make_trainer(const TrainOptions& options) {
    trainer = std::make_unique<TrainExecutor>(*model, *versions, files, options, into_replies());
  }
  // Runs until `id` is answered, with what comes of files.
  void run_until(RequestId id) {
    run_all();
    pump([&] {
      run_all();
      return replies.contains(id);
    });
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
  make_trainer({2000, 128, "base"});
  push(10, wp::CreateAdapter{"a", {.rank = 8, .seed = 3}, "", false});
  push(11, batch("a", 1, 0));
  push(12, batch("a", 5, 1));
  push(13, batch("a", 2, 7));
  push(14, wp::OptimStep{"a", {}});
  run_all();
  EXPECT_EQ(trainer->micro_batches(), 1u);
  EXPECT_NEAR(grad_norm(4), grad_norm(14), 1e-5 * grad_norm(14));
}

TEST_F(TrainExecutorTest, NobodyWaitsForTheFilesOfASave) {
  push(1, wp::CreateAdapter{"a", {.rank = 8, .seed = 3}, "", false});
  push(2, batch("a", 1, 0));
  push(3, wp::OptimStep{"a", {.learning_rate = 1e-2}});
  const auto slow = make_dir("slow"), good = make_dir("good"), later = make_dir("later");
  const auto file = slow_file(slow / "adapter_model.safetensors");
  push(4, wp::SaveAdapter{"a", slow, true});
  push(5, wp::SaveAdapter{"a", good, true});
  run_all();
  // The adapter goes on meanwhile, and the files are of the moment of the request.
  push(6, batch("a", 1, 5));
  push(7, wp::OptimStep{"a", {.learning_rate = 1e-2}});
  push(8, wp::SaveAdapter{"a", later, true});
  run_all();
  done<wp::OptimResult>(7);
  EXPECT_FALSE(replies.contains(4) || replies.contains(5) || replies.contains(8));
  read_away(file);
  run_until(8);
  EXPECT_THAT(failure(4).message, testing::HasSubstr("sync"));
  EXPECT_GT(done<wp::SaveResult>(5).bytes, 0u);
  push(9, wp::CreateAdapter{"b", {.rank = 8}, good, true});
  push(10, batch("b", 1, 5));
  push(11, wp::OptimStep{"b", {.learning_rate = 1e-2}});
  run_until(11);
  const auto again = make_dir("again");
  push(12, wp::SaveAdapter{"b", again, true});
  run_until(12);
  for (const char* name : {"adapter_model.safetensors", "optimizer.safetensors"}) {
    const auto text = [&](const std::filesystem::path& dir) {
      std::ifstream stream(dir / name, std::ios::binary);
      return std::string(std::istreambuf_iterator<char>(stream), {});
    };
    EXPECT_EQ(text(again), text(later)) << name;
    EXPECT_NE(text(again), text(good)) << name;
  }
}

TEST_F(TrainExecutorTest, WithoutMemoryForACopyAnAdapterWaitsForItsFileAndOthersDoNot) {
  TrainOptions options{20, 128, "base"};
  options.copy_bytes = 1000;
  make_trainer(options);
  for (const char* name : {"a", "b"}) push(name[0], wp::CreateAdapter{name, {.rank = 8, .seed = 3}, "", false});
  const auto slow = make_dir("slow");
  const auto file = slow_file(slow / "adapter_model.safetensors");
  push(1, wp::SaveAdapter{"a", slow, true});
  push(2, batch("a", 1, 0));
  push(3, batch("b", 1, 0));
  run_all();
  done<wp::TrainResult>(3);
  EXPECT_FALSE(replies.contains(2));
  read_away(file);
  run_until(2);
  done<wp::TrainResult>(2);
  failure(1);
}

TEST_F(TrainExecutorTest, ASnapshotIsOfItsMomentAndIsWrittenBehind) {
  for (const char* name : {"a", "b"}) push(name[0], wp::CreateAdapter{name, {.rank = 8, .seed = 3}, "", false});
  for (const char* name : {"a", "b"}) push(name[0] + 10u, batch(name, 1, name[0]));
  run_all();
  const auto cut = make_dir("cut"), after = make_dir("after"), failed = make_dir("failed");
  const auto file = slow_file(failed / "adapter-1.safetensors");
  std::vector<TrainExecutor::SnapshotReply> answers;
  const auto snapshot = [&](const std::filesystem::path& dir) {
    trainer->snapshot(dir, [&](TrainExecutor::SnapshotReply reply) { answers.push_back(std::move(reply)); });
  };
  snapshot(failed);
  snapshot(cut);
  const auto go_on = [&](RequestId id) {
    push(id, wp::OptimStep{"a", {.learning_rate = 1e-2}});
    push(id + 1, batch("a", 5, 1));
    push(id + 2, wp::OptimStep{"a", {.learning_rate = 1e-2}});
    run_all();
    return grad_norm(id + 2);
  };
  const double norm = go_on(20);
  EXPECT_TRUE(answers.empty());
  read_away(file);
  pump([&] { return answers.size() == 2; });
  EXPECT_THAT(std::get<wp::Failure>(answers[0]).message, testing::HasSubstr("sync"));
  EXPECT_FALSE(std::filesystem::exists(failed / "manifest.json"));
  const auto result = std::get<wp::SnapshotResult>(std::get<wp::Done>(answers[1]).body);
  EXPECT_EQ(result.last_request.at("a"), 'a' + 10u);
  make_trainer({20, 128, "base"});
  trainer->restore(cut);
  EXPECT_EQ(go_on(30), norm);
}

TEST_F(TrainExecutorTest, ALoadThatFailsChangesNothingAndHoldsUpNobodyElse) {
  for (const char* name : {"a", "b"}) push(name[0], wp::CreateAdapter{name, {.rank = 8, .seed = 3}, "", false});
  push(1, batch("a", 1, 0));
  run_all();
  const auto broken = make_dir("broken");
  ASSERT_EQ(::mkfifo((broken / "adapter_config.json").c_str(), 0600), 0);
  push(2, wp::LoadAdapter{"a", broken, true});
  push(3, wp::CreateAdapter{"c", {.rank = 8}, broken, false});
  push(4, wp::OptimStep{"a", {}});
  push(5, batch("c", 1, 0));
  push(6, batch("b", 1, 0));
  push(7, wp::OptimStep{"b", {}});
  run_all();
  done<wp::OptimResult>(7);
  for (const RequestId id : {2u, 3u, 4u, 5u}) EXPECT_FALSE(replies.contains(id)) << id;
  {
    std::ofstream stream(broken / "adapter_config.json");
    std::filesystem::remove(broken / "adapter_config.json");  // before the second read looks for it
    stream << "{}";
  }
  for (const RequestId id : {4u, 5u}) run_until(id);  // either adapter's files may be read first
  for (const RequestId id : {2u, 3u}) EXPECT_THAT(failure(id).message, testing::HasSubstr("adapter_config.json")) << id;
  EXPECT_THAT(failure(5).message, testing::HasSubstr("no adapter c"));
  EXPECT_EQ(grad_norm(4), grad_norm(7));
  EXPECT_EQ(trainer->adapter_bytes(), 2 * model_spec::adapter_bytes(model->spec(), {.rank = 8}));
}

TEST_F(TrainExecutorTest, AnAdapterBeyondTheMemoryForThemIsRefusedByName) {
  const std::uint64_t one = model_spec::adapter_bytes(model->spec(), {.rank = 8});
  TrainOptions options{20, 128, "base"};
  options.adapter_bytes = 2 * one + one / 2;
  make_trainer(options);
  for (const char* name : {"a", "b", "c"}) push(name[0], wp::CreateAdapter{name, {.rank = 8}, "", false});
  run_all();
  done<wp::Ack>('b');
  const auto refused = failure('c');
  EXPECT_EQ(refused.category, ErrorCategory::user);
  EXPECT_THAT(refused.message,
              testing::AllOf(testing::HasSubstr(std::to_string(one)), testing::HasSubstr(std::to_string(one / 2)),
                             testing::HasSubstr("rank 8")));
  push(1, wp::DropAdapter{"a"});
  run_all();
  push(2, wp::CreateAdapter{"d", {.rank = 8}, "", false});
  run_all();
  done<wp::Ack>(2);
  EXPECT_EQ(trainer->adapter_bytes(), 2 * one);
}

TEST_F(TrainExecutorTest, VersionsThatCannotBeWrittenDoNotPileUp) {
  make_versions(static_cast<std::uint64_t>(2 * weights().flat.nbytes()));
  make_trainer({20, 128, "base"});
  push('a', wp::CreateAdapter{"a", {.rank = 8, .seed = 3}, "", false});
  const auto good = make_dir("good");
  for (RequestId id = 1; id <= 3; ++id) {
    push(id, wp::PublishVersion{"a", "v" + std::to_string(id), scratch.path() / "missing"});
  }
  run_until(3);
  done<wp::Ack>(2);
  EXPECT_THAT(failure(3).message, testing::HasSubstr("v3"));
  versions->drop("v1");
  push(4, wp::PublishVersion{"a", "v4", good});
  push(5, wp::PublishVersion{"a", "v5", good});
  run_until(5);
  done<wp::Ack>(4);
  done<wp::Ack>(5);
}

}  // namespace
}  // namespace ht::worker
