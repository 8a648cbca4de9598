// The real worker process over socket pairs, with a tiny random checkpoint.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <thread>

#include "engine/runtime/test_checkpoint.h"
#include "worker/test_batch.h"
#include "worker_protocol/codec.h"
#include "worker_protocol/messages.h"

namespace ht::worker {
namespace {

namespace wp = worker_protocol;
using engine::TemporaryDirectory;
using wp::RequestId;

class WorkerProcess {
 public:
  WorkerProcess() {
    std::array<std::array<int, 2>, 3> pairs;
    for (auto& pair : pairs) EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, pair.data()), 0);
    const std::string fds[3] = {std::to_string(pairs[0][1]), std::to_string(pairs[1][1]), std::to_string(pairs[2][1])};
    pid_ = ::fork();
    if (pid_ == 0) {
      for (const auto& pair : pairs) ::close(pair[0]);
      ::execl(HT_WORKER_PROGRAM, HT_WORKER_PROGRAM, "--control-fd", fds[0].c_str(), "--training-fd", fds[1].c_str(),
              "--sampling-fd", fds[2].c_str(), nullptr);
      ::_exit(127);
    }
    for (std::size_t lane = 0; lane < 3; ++lane) {
      ::close(pairs[lane][1]);
      fds_[lane] = pairs[lane][0];
    }
  }
  ~WorkerProcess() { kill(); }
  void kill() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    pid_ = -1;
    for (int& fd : fds_) {
      if (fd >= 0) ::close(fd);
      fd = -1;
    }
  }
  // Closes the control stream and gives the exit code.
  int close_control() {
    ::close(std::exchange(fds_[0], -1));
    int status = 0;
    ::waitpid(std::exchange(pid_, -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  RequestId send(wp::RequestBody body) { return send(++last_id, std::move(body)); }
  RequestId send(RequestId id, wp::RequestBody body) {
    last_id = std::max(last_id, id);
    const auto lane = static_cast<std::size_t>(wp::lane_of(body));
    const std::string bytes = wp::frame(wp::encode(wp::Request{id, std::move(body)}));
    for (std::size_t at = 0; at < bytes.size();) {
      const ssize_t count = ::write(fds_[lane], bytes.data() + at, bytes.size() - at);
      if (count <= 0) throw std::runtime_error("the worker is gone");
      at += static_cast<std::size_t>(count);
    }
    lane_of_[id] = lane;
    return id;
  }
  // Whether the outcome of `id` comes within the time.
  bool wait(RequestId id, double seconds = 60) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    const std::size_t lane = lane_of_.at(id);
    while (!outcomes.contains(id)) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
      pollfd ready{fds_[lane], POLLIN, 0};
      if (left.count() < 0 || ::poll(&ready, 1, static_cast<int>(left.count())) <= 0) return false;
      char buffer[65536];
      const ssize_t count = ::read(fds_[lane], buffer, sizeof buffer);
      if (count <= 0) return false;
      frames_[lane].feed({buffer, static_cast<std::size_t>(count)});
      while (const auto payload = frames_[lane].next()) take(wp::decode_reply(*payload));
    }
    return true;
  }
  template <class T>
  T done(RequestId id) {
    if (!wait(id)) throw std::runtime_error("no answer to request " + std::to_string(id));
    const wp::Reply& reply = outcomes.at(id);
    if (const auto* failure = std::get_if<wp::Failure>(&reply.body)) throw std::runtime_error(failure->message);
    return std::get<T>(std::get<wp::Done>(reply.body).body);
  }
  wp::Failure failure(RequestId id) {
    if (!wait(id)) throw std::runtime_error("no answer to request " + std::to_string(id));
    return std::get<wp::Failure>(outcomes.at(id).body);
  }
  wp::WorkerInfo initialize(const std::string& dir, const std::string& config = "{}") {
    return done<wp::WorkerInfo>(send(wp::Initialize{dir, config, 0, 1}));
  }

  RequestId last_id = 0;
  std::map<RequestId, wp::Reply> outcomes;
  std::vector<wp::MicroBatch> micro_batches;

 private:
  void take(wp::Reply reply) {
    if (auto* executed = std::get_if<wp::MicroBatchExecuted>(&reply.body)) {
      for (const auto& slice : executed->micro_batch.slices) EXPECT_FALSE(outcomes.contains(slice.request));
      micro_batches.push_back(executed->micro_batch);
    } else if (!std::holds_alternative<wp::Progress>(reply.body)) {
      EXPECT_FALSE(outcomes.contains(reply.id)) << "two outcomes of request " << reply.id;
      outcomes[reply.id] = std::move(reply);
    }
  }
  pid_t pid_ = -1;
  std::array<int, 3> fds_{-1, -1, -1};
  std::array<wp::FrameReader, 3> frames_;
  std::map<RequestId, std::size_t> lane_of_;
};

wp::OptimStep optim(const std::string& adapter) {
  return {adapter, {.learning_rate = 1e-2}};
}
wp::CreateAdapter create(const std::string& adapter, int rank = 8) {
  return {adapter, {.rank = rank, .seed = 3}, "", false};
}
wp::Sample sample(int max_tokens, int num_samples = 1) {
  wp::Sample request;
  request.prompt = {1, 2, 3, 4, 5};
  request.num_samples = num_samples;
  request.params.max_tokens = max_tokens;
  request.params.seed = 7;
  request.params.stop_on_eos = false;  // LlamaConfig's default is token 2
  return request;
}

class WorkerTest : public testing::Test {
 protected:
  void SetUp() override { engine::write_test_checkpoint(model.path()); }
  TemporaryDirectory model, scratch;
};

TEST_F(WorkerTest, TrainsPublishesAndSamples) {
  WorkerProcess worker;
  const auto info = worker.initialize(model.path());
  EXPECT_EQ(info.max_seq_len, 128);
  EXPECT_THAT(info.memory_plan, testing::HasSubstr("cache"));
  const RequestId created = worker.send(create("a"));
  std::vector<RequestId> calls, steps;
  for (int i = 0; i < 6; ++i) {
    calls.push_back(worker.send(batch("a", 2, 10)));
    steps.push_back(worker.send(optim("a")));
  }
  worker.done<wp::Ack>(created);
  for (const RequestId id : steps) EXPECT_GT(worker.done<wp::OptimResult>(id).metrics.at("grad_norm"), 0) << id;
  std::vector<double> losses;
  for (const RequestId id : calls) {
    const auto result = worker.done<wp::TrainResult>(id);
    EXPECT_EQ(result.logprobs.size(), 20u);
    losses.push_back(result.metrics.at("loss:sum"));
    for (const auto& [name, value] : result.metrics) EXPECT_EQ(std::count(name.begin(), name.end(), ':'), 1) << name;
  }
  EXPECT_LT(losses.back(), losses.front());

  const auto dir = scratch.path() / "v1";
  std::filesystem::create_directory(dir);
  worker.done<wp::Ack>(worker.send(wp::PublishVersion{"a", "v1", dir}));
  const auto snapshot = scratch.path() / "snapshot";
  std::filesystem::create_directory(snapshot);
  const auto cut = worker.done<wp::SnapshotResult>(worker.send(wp::Snapshot{snapshot}));
  EXPECT_THAT(cut.versions_on_disk, testing::ElementsAre("v1"));
  EXPECT_TRUE(std::filesystem::exists(dir / "adapter_model.safetensors"));
  wp::Sample request = sample(9, 3);
  request.version = "v1";
  request.prompt_logprobs = true;
  const auto result = worker.done<wp::SampleResult>(worker.send(request));
  ASSERT_EQ(result.sequences.size(), 3u);
  for (const auto& sequence : result.sequences) {
    EXPECT_EQ(sequence.tokens.size(), 9u);
    EXPECT_EQ(sequence.stop_reason, wp::StopReason::length);
  }
  EXPECT_TRUE(std::isnan(result.prompt_logprobs.at(0)));

  // The trainer's logprobs of prompt and sample are the sampler's.
  wp::ForwardBackward check = batch("a", 1, 1, 0, true);
  check.batch = {};
  std::vector<std::int32_t> all = request.prompt;
  all.insert(all.end(), result.sequences[0].tokens.begin(), result.sequences[0].tokens.end());
  check.batch.tokens.assign(all.begin(), all.end() - 1);
  check.batch.targets.assign(all.begin() + 1, all.end());
  check.batch.cu_seqlens = {0, static_cast<std::int32_t>(all.size()) - 1};
  check.batch.target_width = {1};
  check.batch.weights.assign(all.size() - 1, 1.0f);
  const auto trained = worker.done<wp::TrainResult>(worker.send(check));
  for (std::size_t i = 0; i + 1 < all.size(); ++i) {
    const float sampled = i + 1 < request.prompt.size() ? result.prompt_logprobs[i + 1]
                                                        : result.sequences[0].logprobs[i + 1 - request.prompt.size()];
    EXPECT_NEAR(trained.logprobs[i], sampled, 1e-5) << i;
  }

  // The counters are those after a slice: an answer may come before them.
  wp::StatusResult status;
  while (status.trained_tokens < 6u * 20u + all.size() - 1) {
    status = worker.done<wp::StatusResult>(worker.send(wp::Status{}));
  }
  EXPECT_EQ(status.trained_tokens, 6u * 20u + all.size() - 1);
  EXPECT_GE(status.sampled_tokens, 5u + 3u * 8u);
  EXPECT_GE(status.peak_rss_bytes, status.rss_bytes);
  EXPECT_GT(status.rss_bytes, std::uint64_t{1} << 20);
  EXPECT_GT(status.adapter_bytes, 0u);
  EXPECT_GE(status.adapter_bytes_limit, status.adapter_bytes);
  EXPECT_GT(status.version_bytes, 0u);
  EXPECT_THAT(info.memory_plan, testing::HasSubstr("tenants of rank 32 at length 128"));

  // A version that is not in memory comes from its directory, and gives the same tokens.
  wp::Sample from_disk = request;
  from_disk.version = "elsewhere";
  from_disk.version_dir = dir;
  EXPECT_EQ(worker.done<wp::SampleResult>(worker.send(from_disk)).sequences[2].tokens, result.sequences[2].tokens);
  EXPECT_EQ(worker.close_control(), 0);
}

TEST_F(WorkerTest, SmallCallsOfThreeAdaptersShareMicroBatches) {
  WorkerProcess worker;
  worker.initialize(model.path());
  for (const char* name : {"a", "b", "c"}) worker.done<wp::Ack>(worker.send(create(name)));
  // Something to do while the calls are queued.
  const RequestId busy = worker.send(batch("a", 16, 128));
  std::vector<RequestId> ids;
  for (int call = 0; call < 8; ++call) {
    for (const char* name : {"a", "b", "c"}) ids.push_back(worker.send(batch(name, 1, 12, call)));
  }
  worker.done<wp::TrainResult>(busy);
  for (const RequestId id : ids) worker.done<wp::TrainResult>(id);
  EXPECT_LE(worker.micro_batches.size(), 1u + 12u);
}

TEST_F(WorkerTest, ASnapshotAndAReplayGiveTheSameBits) {
  const auto run = [](WorkerProcess& worker, RequestId from) {
    std::vector<RequestId> ids;
    RequestId id = from;
    for (int i = 0; i < 4; ++i) {
      for (const char* name : {"a", "b"}) {
        ids.push_back(worker.send(id++, batch(name, 3, 11 + i, i)));
        ids.push_back(worker.send(id++, batch(name, 2, 7, i + 1)));
        worker.send(id++, optim(name));
      }
    }
    std::vector<std::vector<float>> logprobs;
    for (const RequestId one : ids) logprobs.push_back(worker.done<wp::TrainResult>(one).logprobs);
    return logprobs;
  };
  const auto dir = scratch.path() / "snapshot", version = scratch.path() / "version";
  std::filesystem::create_directory(dir);
  std::filesystem::create_directory(version);
  std::vector<std::vector<float>> first;
  std::vector<wp::MicroBatch> record;
  std::vector<std::int32_t> tokens;
  wp::Sample request = sample(8);
  request.version = "v";
  {
    WorkerProcess worker;
    worker.initialize(model.path(), R"({"micro_batch_tokens": 32})");
    worker.done<wp::Ack>(worker.send(create("a", 8)));
    worker.done<wp::Ack>(worker.send(create("b", 16)));
    run(worker, 10);
    worker.done<wp::TrainResult>(worker.send(50, batch("a", 3, 9)));  // a pending gradient
    worker.done<wp::Ack>(worker.send(51, wp::PublishVersion{"b", "v", version}));
    const auto cut = worker.done<wp::SnapshotResult>(worker.send(90, wp::Snapshot{dir}));
    EXPECT_EQ(cut.last_request.at("a"), 50u);
    EXPECT_EQ(cut.last_request.at("b"), 51u);
    EXPECT_THAT(cut.versions_on_disk, testing::ElementsAre("v"));
    worker.micro_batches.clear();
    first = run(worker, 100);
    record = worker.micro_batches;
    tokens = worker.done<wp::SampleResult>(worker.send(request)).sequences[0].tokens;
    worker.kill();
  }
  WorkerProcess worker;
  worker.initialize(model.path(), R"({"micro_batch_tokens": 64})");
  worker.done<wp::Ack>(worker.send(wp::Restore{dir}));
  worker.done<wp::Ack>(worker.send(wp::Replay{record}));
  const auto second = run(worker, 100);
  EXPECT_EQ(worker.micro_batches, record);
  ASSERT_EQ(second.size(), first.size());
  for (std::size_t i = 0; i < first.size(); ++i) {
    ASSERT_EQ(second[i].size(), first[i].size());
    EXPECT_EQ(std::memcmp(second[i].data(), first[i].data(), first[i].size() * sizeof(float)), 0) << i;
  }
  EXPECT_EQ(worker.done<wp::SampleResult>(worker.send(request)).sequences[0].tokens, tokens);
}

TEST_F(WorkerTest, StopsOnTokensAndOnStringsAcrossTokens) {
  WorkerProcess worker;
  worker.initialize(model.path());
  const auto free = worker.done<wp::SampleResult>(worker.send(sample(10))).sequences[0].tokens;
  ASSERT_EQ(free.size(), 10u);

  wp::Sample request = sample(10);
  request.params.stop_tokens = {free[4]};
  const auto at = static_cast<std::size_t>(std::find(free.begin(), free.end(), free[4]) - free.begin());
  auto stopped = worker.done<wp::SampleResult>(worker.send(request)).sequences[0];
  EXPECT_EQ(stopped.tokens,
            std::vector<std::int32_t>(free.begin(), free.begin() + static_cast<std::ptrdiff_t>(at) + 1));
  EXPECT_EQ(stopped.stop_reason, wp::StopReason::stop);

  request.params.stop_tokens.clear();
  const auto text = [](std::int32_t token) { return "<" + std::to_string(token) + ">"; };
  const std::string all = text(free[5]) + text(free[6]);
  request.params.stop_strings = {all.substr(1, all.size() - 2)};
  const RequestId waiting = worker.send(request);
  EXPECT_FALSE(worker.wait(waiting, 0.2));
  worker.done<wp::Ack>(worker.send(wp::SetTokenTable{}));  // there is none
  EXPECT_EQ(worker.failure(waiting).category, ErrorCategory::user);
  EXPECT_EQ(worker.failure(worker.send(request)).category, ErrorCategory::user);

  const auto table = scratch.path() / "tokens";
  std::ofstream stream(table, std::ios::binary);
  const auto u32 = [&stream](std::uint32_t value) { stream.write(reinterpret_cast<const char*>(&value), 4); };
  stream << "HTTT";
  u32(1);
  u32(31);
  for (int token = 0; token < 31; ++token) {
    stream.put(0);
    u32(static_cast<std::uint32_t>(text(token).size()));
    stream << text(token);
  }
  stream.close();
  worker.done<wp::Ack>(worker.send(wp::SetTokenTable{table}));
  stopped = worker.done<wp::SampleResult>(worker.send(request)).sequences[0];
  EXPECT_EQ(stopped.stop_reason, wp::StopReason::stop);
  EXPECT_LE(stopped.tokens.size(), 7u);
  EXPECT_EQ(stopped.tokens[stopped.tokens.size() - 2], free[5]);
  EXPECT_EQ(stopped.tokens.back(), free[6]);
}

TEST_F(WorkerTest, ASampleAndACancelDoNotWaitForALongMicroBatch) {
  WorkerProcess worker;
  worker.initialize(model.path(), R"({"micro_batch_tokens": 1000000})");
  worker.done<wp::Ack>(worker.send(create("a")));
  const RequestId training = worker.send(batch("a", 2500, 128));
  ASSERT_FALSE(worker.wait(training, 0.2));
  const RequestId cancelled = worker.send(sample(120, 64));
  worker.done<wp::Ack>(worker.send(wp::Cancel{cancelled}));
  EXPECT_THAT(worker.failure(cancelled).message, testing::HasSubstr("cancelled"));
  worker.done<wp::SampleResult>(worker.send(sample(2)));
  worker.done<wp::StatusResult>(worker.send(wp::Status{}));
  EXPECT_FALSE(worker.wait(training, 0)) << "the micro-batch was over before the sample";
  worker.done<wp::TrainResult>(training);
  EXPECT_EQ(worker.micro_batches.size(), 1u);
  const auto status = worker.done<wp::StatusResult>(worker.send(wp::Status{}));
  EXPECT_EQ(status.cache_blocks_free, status.cache_blocks_total);
}

TEST_F(WorkerTest, AnAdapterBeyondTheBudgetIsRefused) {
  WorkerProcess worker;
  worker.initialize(model.path(), R"({"adapter_bytes": 500000})");
  worker.done<wp::Ack>(worker.send(create("a", 32)));
  const auto refused = worker.failure(worker.send(create("b", 32)));
  EXPECT_EQ(refused.category, ErrorCategory::user);
  EXPECT_THAT(refused.message, testing::AllOf(testing::HasSubstr("rank 32"), testing::HasSubstr("bytes")));
  worker.done<wp::Ack>(worker.send(create("c", 1)));
  worker.done<wp::Ack>(worker.send(wp::DropAdapter{"a"}));
  worker.done<wp::Ack>(worker.send(create("b", 32)));
}

TEST_F(WorkerTest, ErrorsStayWithTheirRequest) {
  WorkerProcess worker;
  const auto refused = worker.failure(worker.send(wp::Initialize{model.path(), R"({"colour": 1})", 0, 1}));
  EXPECT_EQ(refused.category, ErrorCategory::user);
  EXPECT_THAT(refused.message, testing::AllOf(testing::HasSubstr("colour"), testing::HasSubstr("sampling_share")));
  worker.initialize(model.path(), R"({"kv_cache_tokens": 64})");
  worker.done<wp::Ack>(worker.send(create("a")));
  EXPECT_THAT(worker.failure(worker.send(batch("nobody", 1, 4))).message, testing::HasSubstr("nobody"));
  wp::ForwardBackward wrong = batch("a", 1, 4);
  wrong.batch.tokens[2] = 31;
  EXPECT_THAT(worker.failure(worker.send(wrong)).message, testing::HasSubstr("31"));
  EXPECT_THAT(worker.failure(worker.send(batch("a", 1, 129))).message, testing::HasSubstr("128"));
  EXPECT_THAT(worker.failure(worker.send(sample(100))).message, testing::HasSubstr("kv_cache_tokens"));
  wp::Sample unknown = sample(1);
  unknown.version = "none";
  EXPECT_EQ(worker.failure(worker.send(unknown)).category, ErrorCategory::user);
  worker.done<wp::TrainResult>(worker.send(batch("a", 1, 4)));
  worker.done<wp::OptimResult>(worker.send(optim("a")));
  worker.done<wp::Ack>(worker.send(wp::DropAdapter{"a"}));
  EXPECT_EQ(worker.failure(worker.send(optim("a"))).category, ErrorCategory::user);
}

}  // namespace
}  // namespace ht::worker
