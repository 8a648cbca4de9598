#include "worker/train_executor.h"

#include "model_spec/memory_plan.h"
#include "worker/executor_test.h"
#include "worker/test_batch.h"

namespace ht::worker {
namespace {

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
  push(1, batch("a", 1, 10, 0));
  push(2, batch("a", 5, 10, 1));
  run_all(2);
  done<wp::TrainResult>(1);
  EXPECT_THAT(failure(2).message, testing::HasSubstr("injected"));
  EXPECT_EQ(trainer->micro_batches(), 1u);
  push(3, wp::OptimStep{"a", {}});
  push(4, batch("control", 1, 10, 0));
  push(5, wp::OptimStep{"control", {}});
  run_all();
  EXPECT_NEAR(grad_norm(3), grad_norm(5), 1e-5 * grad_norm(5));
}

TEST_F(TrainExecutorTest, SeveralMicroBatchesGiveTheGradientOfOne) {
  for (const char* name : {"a", "control"}) push(name[0], wp::CreateAdapter{name, {.rank = 8, .seed = 3}, "", false});
  run_all();
  push(1, batch("a", 1, 10, 0));
  push(2, batch("a", 5, 10, 1));
  push(3, batch("a", 2, 10, 7));
  push(4, wp::OptimStep{"a", {}});
  run_all();
  EXPECT_GT(trainer->micro_batches(), 3u);
  make_trainer({2000, 128, "base"});
  push(10, wp::CreateAdapter{"a", {.rank = 8, .seed = 3}, "", false});
  push(11, batch("a", 1, 10, 0));
  push(12, batch("a", 5, 10, 1));
  push(13, batch("a", 2, 10, 7));
  push(14, wp::OptimStep{"a", {}});
  run_all();
  EXPECT_EQ(trainer->micro_batches(), 1u);
  EXPECT_NEAR(grad_norm(4), grad_norm(14), 1e-5 * grad_norm(14));
}

TEST_F(TrainExecutorTest, NobodyWaitsForTheFilesOfASave) {
  push(1, wp::CreateAdapter{"a", {.rank = 8, .seed = 3}, "", false});
  push(2, batch("a", 1, 10, 0));
  push(3, wp::OptimStep{"a", {.learning_rate = 1e-2}});
  const auto slow = make_dir("slow"), good = make_dir("good"), later = make_dir("later");
  const auto file = slow_file(slow / "adapter_model.safetensors");
  push(4, wp::SaveAdapter{"a", slow, true});
  push(5, wp::SaveAdapter{"a", good, true});
  run_all();
  // The adapter goes on meanwhile, and the files are of the moment of the request.
  push(6, batch("a", 1, 10, 5));
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
  push(10, batch("b", 1, 10, 5));
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
  push(2, batch("a", 1, 10, 0));
  push(3, batch("b", 1, 10, 0));
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
  for (const char* name : {"a", "b"}) push(name[0] + 10u, batch(name, 1, 10, name[0]));
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
    push(id + 1, batch("a", 5, 10, 1));
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
  push(1, batch("a", 1, 10, 0));
  run_all();
  const auto broken = make_dir("broken");
  ASSERT_EQ(::mkfifo((broken / "adapter_config.json").c_str(), 0600), 0);
  push(2, wp::LoadAdapter{"a", broken, true});
  push(3, wp::CreateAdapter{"c", {.rank = 8}, broken, false});
  push(4, wp::OptimStep{"a", {}});
  push(5, batch("c", 1, 10, 0));
  push(6, batch("b", 1, 10, 0));
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
