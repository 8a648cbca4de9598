// Against a real process: test_worker.cpp.

#include "server/workers/worker_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <optional>
#include <sstream>
#include <vector>

#include "base/error.h"

namespace ht::workers {
namespace {

namespace wp = worker_protocol;
using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;
using testing::StartsWith;

class WorkerGroupTest : public testing::Test {
 protected:
  void start(WorkerOptions options = {HT_TEST_WORKER, "test", {}}) {
    WorkerGroup::Callbacks callbacks;
    callbacks.on_reply = [this](wp::Reply reply) {
      EXPECT_FALSE(exit_) << "a reply after the end";
      replies_.push_back(std::move(reply));
      if (after_reply_) after_reply_();
    };
    callbacks.on_exit = [this](std::string reason) {
      EXPECT_FALSE(exit_) << "two ends";
      exit_ = std::move(reason);
    };
    group_.emplace(io_, std::move(options), std::move(callbacks));
    group_->start();
  }
  void initialize(const std::string& behaviour) { group_->send({1, wp::Initialize{.model_dir = behaviour}}); }
  void run_until(const std::function<bool()>& condition) {
    const auto deadline = std::chrono::steady_clock::now() + seconds(15);
    while (!condition()) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline) << "nothing happens";
      io_.restart();
      io_.run_one_for(milliseconds(50));
    }
  }
  void run_until_exit() {
    run_until([this] { return exit_.has_value(); });
  }
  std::string progress_text(std::size_t i) const { return std::get<wp::Progress>(replies_.at(i).body).text; }

  boost::asio::io_context io_{1};
  std::vector<wp::Reply> replies_;
  std::optional<std::string> exit_;
  std::function<void()> after_reply_;
  std::optional<WorkerGroup> group_;
};

TEST_F(WorkerGroupTest, EveryLaneAnswers) {
  start();
  initialize("hello");
  group_->send({2, wp::OptimStep{"a", {}}});
  group_->send({3, wp::Sample{.prompt = {1}}});
  run_until([this] { return replies_.size() == 6; });
  std::map<wp::RequestId, int> count;
  for (const auto& reply : replies_) ++count[reply.id];
  EXPECT_EQ(count, (std::map<wp::RequestId, int>{{1, 2}, {2, 2}, {3, 2}}));
  EXPECT_GT(group_->pid(), 0);
  group_->stop(seconds(10));
  run_until_exit();
  EXPECT_EQ(*exit_, "exit code 0");
  EXPECT_EQ(group_->pid(), 0);
  group_->send({4, wp::Status{}});  // lost, quietly
}

TEST_F(WorkerGroupTest, ProcessIsSetUp) {
  ::setenv("HOSTED_TINKER_TORCH_LIB", "/torch/lib", 1);
  ::setenv("LD_LIBRARY_PATH", "/mine", 1);
  for (const char* name : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}) ::unsetenv(name);
  const int leak = ::socket(AF_INET, SOCK_STREAM, 0);  // not close-on-exec, as Asio's are
  start();
  ::unsetenv("HOSTED_TINKER_TORCH_LIB");
  ::unsetenv("LD_LIBRARY_PATH");
  initialize("describe");
  run_until([this] { return replies_.size() == 2; });
  ::close(leak);
  EXPECT_THAT(progress_text(0), StartsWith("/torch/lib:/mine|passive 3000|leader|"));
  std::istringstream fds(progress_text(0).substr(progress_text(0).rfind('|') + 1));
  EXPECT_EQ(std::distance(std::istream_iterator<int>(fds), {}), 3) << progress_text(0);
}

TEST_F(WorkerGroupTest, ManyRequestsInOrder) {
  start();
  constexpr int kRequests = 5000;
  for (int i = 1; i <= kRequests; ++i) {
    wp::ForwardBackward work{.adapter = "a"};
    work.batch.tokens.assign(500, i);
    group_->send({static_cast<wp::RequestId>(i), work});
  }
  run_until([this] { return replies_.size() == 2 * kRequests; });
  for (int i = 0; i < kRequests; ++i) {
    ASSERT_EQ(replies_[static_cast<std::size_t>(2 * i)].id, static_cast<wp::RequestId>(i + 1));
  }
}

TEST_F(WorkerGroupTest, ExitCode) {
  start();
  initialize("exit");
  run_until_exit();
  EXPECT_EQ(*exit_, "exit code 7");
}

TEST_F(WorkerGroupTest, Killed) {
  start();
  initialize("hello");
  run_until([this] { return replies_.size() == 2; });
  ::kill(group_->pid(), SIGKILL);
  run_until_exit();
  EXPECT_EQ(*exit_, "killed by signal 9 (Killed)");
}

TEST_F(WorkerGroupTest, RepliesOfADeadWorkerArriveFirst) {
  start();
  initialize("flood");
  run_until_exit();
  EXPECT_EQ(replies_.size(), 20000U);
  EXPECT_THAT(*exit_, StartsWith("killed by signal 9"));
}

TEST_F(WorkerGroupTest, TornFrameIsDropped) {
  start();
  initialize("torn");
  run_until_exit();
  EXPECT_EQ(replies_.size(), 2U);
  EXPECT_THAT(*exit_, StartsWith("killed by signal 11"));
}

TEST_F(WorkerGroupTest, GarbageEndsTheWorker) {
  start();
  initialize("garbage");
  run_until_exit();
  EXPECT_THAT(*exit_, StartsWith("sent garbage on its control stream"));
  EXPECT_THAT(*exit_, HasSubstr("was killed"));
  EXPECT_TRUE(replies_.empty());
}

TEST_F(WorkerGroupTest, FrameTooLargeEndsTheWorker) {
  start();
  initialize("huge");
  run_until_exit();
  EXPECT_THAT(*exit_, StartsWith("sent garbage on its control stream"));
}

TEST_F(WorkerGroupTest, ClosedStreamEndsTheWorker) {
  start();
  initialize("close");
  run_until_exit();
  EXPECT_THAT(*exit_, StartsWith("closed its control stream and did not end"));
}

TEST_F(WorkerGroupTest, StopKillsWhatDoesNotEnd) {
  start();
  initialize("never ends");
  run_until([this] { return replies_.size() == 2; });
  const auto begin = std::chrono::steady_clock::now();
  group_->stop(milliseconds(100));
  run_until_exit();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, seconds(3));
  EXPECT_THAT(*exit_, StartsWith("did not end when asked to"));
}

TEST_F(WorkerGroupTest, StopWritesWhatIsQueued) {
  start();
  wp::ForwardBackward work{.adapter = "a"};
  work.batch.tokens.assign(100000, 1);
  for (int i = 1; i <= 20; ++i) group_->send({static_cast<wp::RequestId>(i), work});
  bool stopped = false;
  after_reply_ = [&] {
    if (!std::exchange(stopped, true)) group_->stop(seconds(10));
  };
  run_until_exit();
  EXPECT_EQ(*exit_, "exit code 0");
}

TEST_F(WorkerGroupTest, WhatTheWorkerStartedEndsWithIt) {
  start();
  const int pid = group_->pid();
  initialize("grandchild");
  run_until_exit();
  EXPECT_EQ(*exit_, "exit code 0");
  // The kernel may need a moment to take the grandchild out of the group.
  for (int i = 0; i < 200 && ::kill(-pid, 0) == 0; ++i) ::usleep(10000);
  EXPECT_NE(::kill(-pid, 0), 0);
}

TEST_F(WorkerGroupTest, DestroyedInsideItsCallback) {
  start();
  after_reply_ = [this] { group_.reset(); };
  const int pid = group_->pid();
  initialize("hello");
  run_until([this] { return !replies_.empty(); });
  run_until([pid] { return ::kill(pid, 0) != 0; });
  EXPECT_EQ(replies_.size(), 1U);
  EXPECT_FALSE(exit_);
}

TEST_F(WorkerGroupTest, NoSuchProgram) {
  try {
    start({"/no/such/worker", "test", {}});
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("/no/such/worker"));
    EXPECT_THAT(error.what(), HasSubstr("No such file"));
  }
}

TEST_F(WorkerGroupTest, LogFile) {
  const std::string path = testing::TempDir() + "/worker-" + std::to_string(::getpid()) + ".log";
  start({HT_TEST_WORKER, "test", path});
  initialize("exit");
  run_until_exit();
  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  EXPECT_EQ(text, "the test worker runs\n");
  ::unlink(path.c_str());
}

// kill -9 of the server: its workers must not outlive it.
TEST(WorkerGroup, DiesWithTheServer) {
  int report[2];
  ASSERT_EQ(::pipe(report), 0);
  const pid_t server = ::fork();
  if (server == 0) {
    boost::asio::io_context io(1);
    WorkerGroup group(io, {HT_TEST_WORKER, "test", {}}, {});
    group.start();
    const int pid = group.pid();
    if (::write(report[1], &pid, sizeof pid) != sizeof pid) ::_exit(1);
    group.send({1, wp::Initialize{.model_dir = "never ends"}});
    io.run();
    ::_exit(0);
  }
  int worker = 0;
  ASSERT_EQ(::read(report[0], &worker, sizeof worker), static_cast<ssize_t>(sizeof worker));
  ASSERT_EQ(::kill(worker, 0), 0);
  ::usleep(100000);
  ::kill(server, SIGKILL);
  ::waitpid(server, nullptr, 0);
  // Gone, or a zombie that its new parent has not reaped yet.
  const auto gone = [worker] {
    std::ifstream stat("/proc/" + std::to_string(worker) + "/stat");
    std::string pid, name, state;
    return !(stat >> pid >> name >> state) || state == "Z" || state == "X";
  };
  for (int i = 0; i < 500 && !gone(); ++i) ::usleep(10000);
  EXPECT_TRUE(gone());
}

}  // namespace
}  // namespace ht::workers
