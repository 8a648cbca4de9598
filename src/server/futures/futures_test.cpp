#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>

#include <fstream>

#include "server/futures/test_rig.h"
#include "server/futures/toy_adapter.h"

namespace ht::futures::toy {
namespace {

namespace wp = worker_protocol;
using std::chrono::milliseconds;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class FuturesTest : public RigTest {
 protected:
  FuturesTest() { start(); }
  // After the data directory was moved.
  void start_elsewhere() {
    rig_.reset();
    const auto from = options_.dir;
    options_.dir += "_moved";
    std::filesystem::remove_all(options_.dir);
    std::filesystem::rename(from, options_.dir);
    start();
  }
  bool ready() {
    return rig_->run([&] { return rig_->dispatch->status(kBase).state == dispatch::GroupState::ready; });
  }
};

TEST_F(FuturesTest, RunsByNumberWhateverTheArrivalOrder) {
  const auto last = submit(step("s:m", 3, 1e-3));
  const auto second = submit(train("s:m", 2, {{4, 5}}));
  submit(create("s:m", 7));
  EXPECT_EQ(rig_->poll_once(last, milliseconds(50)).state, PollState::pending);
  EXPECT_EQ(rig_->futures->counts().parked, 2u);
  submit(train("s:m", 1, {{1, 2, 3}}));
  Adapter wanted = Adapter::fresh(7);
  wanted.backward(std::vector<std::int32_t>{1, 2, 3});
  wanted.backward(std::vector<std::int32_t>{4, 5});
  EXPECT_THAT(text(second), HasSubstr(fmt::format("g={:.0f} ", visible(wanted.g))));
  wanted.step(1e-3);
  EXPECT_THAT(text(last), HasSubstr(fmt::format("w={:.0f} ", visible(wanted.w))));
}

TEST_F(FuturesTest, ARepeatedRequestIsTheFirstOne) {
  const Submitted first = rig_->futures->submit(create("s:m", 7));
  EXPECT_FALSE(first.duplicate);
  const auto trained = submit(train("s:m", 1, {{1}}));
  EXPECT_EQ(submit(train("s:m", 1, {{1}})), trained);
  text(trained);
  const Submitted again = rig_->futures->submit(train("s:m", 1, {{1}}));
  EXPECT_TRUE(again.duplicate);
  EXPECT_EQ(again.request_id, trained);
  EXPECT_EQ(again.context, "s:m/1");
  Submission other = train("s:m", 1, {{2}});
  other.fingerprint = "other";
  EXPECT_THROW(submit(other), Error);
}

TEST_F(FuturesTest, ANumberBelowTheHorizonIsRefused) {
  submit(create("s:m", 7));
  rig_->futures->consume("s:m", 1);
  rig_->futures->consume("s:m", 3);
  const auto second = submit(step("s:m", 2, 1));
  EXPECT_THAT(text(second), HasSubstr("steps=1"));
  for (const std::int64_t seq : {1, 3, -4}) {
    try {
      submit(step("s:m", seq, 1));
      ADD_FAILURE() << seq;
    } catch (const Error& error) {
      EXPECT_EQ(error.category(), ErrorCategory::user);
      EXPECT_THAT(error.what(), HasSubstr("seq_id " + std::to_string(seq)));
    }
  }
  EXPECT_THAT(text(submit(step("s:m", 4, 1))), HasSubstr("steps=2"));
}

TEST_F(FuturesTest, AnInvalidRequestConsumesItsNumber) {
  submit(create("s:m", 7));
  Submission invalid = train("s:m", 1, {{1}});
  invalid.failure = Failed{ErrorCategory::user, "token 99 is too large"};
  const auto id = submit(invalid);
  EXPECT_EQ(text(id), "user: token 99 is too large");
  EXPECT_THAT(text(submit(step("s:m", 2, 1))), HasSubstr("steps=1"));
  start();
  EXPECT_EQ(text(id), "user: token 99 is too large");
  EXPECT_EQ(submit(invalid), id);
  EXPECT_THAT(text(submit(step("s:m", 3, 1))), HasSubstr("steps=2"));
}

TEST_F(FuturesTest, AFailedCreateOfAModelConsumesItsNumberToo) {
  Submission invalid = create("s:m", 7);
  invalid.failure = Failed{ErrorCategory::user, "rank 3"};
  EXPECT_EQ(text(submit(invalid)), "user: rank 3");
  EXPECT_THAT(text(submit(step("s:m", 1, 1))), HasSubstr("unknown adapter"));
  EXPECT_THAT(text(submit(train("s:m", 2, {{1}}))), HasSubstr("unknown adapter"));
}

TEST_F(FuturesTest, PollsWakeAtOnceTimeOutAndKnowWhatIsGone) {
  EXPECT_EQ(rig_->poll_once("r1").state, PollState::unknown);
  EXPECT_EQ(rig_->poll_once("nonsense").state, PollState::unknown);
  EXPECT_EQ(rig_->poll_once("r99999999999999999999999").state, PollState::unknown);
  const auto id = submit(create("s:m", 7));
  const auto later = submit(step("s:m", 2, 1));
  text(id);
  EXPECT_EQ(rig_->poll_once(later, milliseconds(30)).state, PollState::pending);
  bool woken = false;
  boost::asio::co_spawn(
      rig_->io,
      [&]() -> boost::asio::awaitable<void> {
        const Poll poll = co_await rig_->futures->poll(later, std::chrono::seconds(30), [] { return false; });
        woken = poll.state == PollState::done && poll.operation == Operation::optim_step;
      },
      boost::asio::detached);
  rig_->run([] { return false; }, std::chrono::seconds(0));
  submit(step("s:m", 1, 1));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(rig_->run([&] { return woken; }));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
}

TEST_F(FuturesTest, TellsWhyItWaits) {
  const auto id = submit(create("s:m", 7));
  const Poll poll = rig_->poll_once(id);
  EXPECT_EQ(poll.queue_state, "paused_capacity");
  EXPECT_THAT(poll.queue_state_reason, HasSubstr("being loaded"));
  text(id);
  rig_->kill_worker();
  ASSERT_TRUE(rig_->run([&] { return rig_->dispatch->status(kBase).restarts == 1; }));
  const auto next = submit(step("s:m", 1, 1));
  EXPECT_THAT(rig_->poll_once(next).queue_state_reason, HasSubstr("killed by signal 9"));
  EXPECT_THAT(text(next), HasSubstr("steps=1"));
}

TEST_F(FuturesTest, AModelThatCannotBeLoadedIsSaid) {
  options_.model_dir = "";
  start();
  EXPECT_TRUE(rig_->run([&] { return rig_->dispatch->status(kBase).restarts >= 2; }));
  EXPECT_THAT(rig_->dispatch->status(kBase).last_error, HasSubstr("no such model"));
}

TEST_F(FuturesTest, CancelEndsASample) {
  ready();
  submit(create("s:m", 7));
  const auto blocked = submit(sample("s", 1, "", "", 5));
  rig_->futures->cancel(blocked);
  rig_->futures->cancel("nonsense");
  EXPECT_EQ(text(blocked), "user: the request was cancelled");
  EXPECT_THAT(text(submit(sample("s", 2, "", "", 5))), StartsWith("["));
}

TEST_F(FuturesTest, ASampleWaitsForItsVersion) {
  const auto dir = options_.dir / "v1";
  const auto early = submit(sample("s", 1, "v1", dir, 5, 1));
  EXPECT_THAT(text(early), HasSubstr("unknown version"));  // nothing says that it will come
  const auto published = submit(publish("s:m", 1, "v2", dir));
  const auto waiting = submit(sample("s", 2, "v2", dir, 5, 1));
  EXPECT_EQ(rig_->poll_once(waiting, milliseconds(50)).state, PollState::pending);
  submit(create("s:m", 7));
  EXPECT_THAT(text(waiting), HasSubstr(std::to_string(sampled(Adapter::fresh(7).w, 5, 0))));
}

TEST_F(FuturesTest, TheEndOfASessionFailsWhatIsParked) {
  const auto id = submit(create("s:m", 7));
  text(id);
  const auto parked = submit(step("s:m", 5, 1));
  const auto other = submit(create("t:m", 7));
  submit(publish("t:m", 2, "w", options_.dir / "w"));
  const auto waiting = submit(sample("s", 1, "w", options_.dir / "w", 5));
  rig_->futures->end_session("s", {"s:m"}, "finished");
  EXPECT_EQ(text(parked), "user: the session has ended (finished)");
  EXPECT_EQ(text(waiting), "user: the session has ended (finished)");
  EXPECT_THAT(text(other), StartsWith("ok"));
  EXPECT_THROW(submit(step("s:m", 1, 1)), Error);
  start();
  EXPECT_EQ(text(parked), "user: the session has ended (finished)");
  EXPECT_THAT(text(submit(step("t:m", 1, 1))), HasSubstr("steps=1"));
}

TEST_F(FuturesTest, ARequestThatKillsTheWorkerFailsAlone) {
  const auto made = submit(create("s:m", 7));
  submit(create("s:n", 8));
  text(made);
  std::vector<std::string> good;
  for (int i = 1; i <= 10; ++i) good.push_back(submit(train("s:n", i, {{i}})));
  const auto deadly = submit(train("s:m", 1, {{3}, {4}, {5}, {kDeadly}}));
  const auto after = submit(step("s:m", 2, 1));
  const auto sampled = submit(sample("s", 1, "", "", 5));
  EXPECT_THAT(text(deadly), StartsWith("server: the worker ended each time"));
  EXPECT_THAT(text(after), HasSubstr("steps=1"));
  Adapter wanted = Adapter::fresh(7);
  wanted.step(1);
  EXPECT_THAT(text(after), HasSubstr(fmt::format("w={:.0f} ", visible(wanted.w))));
  for (const auto& id : good) EXPECT_THAT(text(id), HasSubstr("g="));
  EXPECT_THAT(text(sampled), StartsWith("["));
  Submission killer = sample("s", 2, "", "", 5);
  std::get<wp::Sample>(killer.work).prompt = {kDeadly};
  EXPECT_THAT(text(submit(killer)), StartsWith("server: the worker ended each time"));
  EXPECT_THAT(text(submit(step("s:m", 3, 1))), HasSubstr("steps=2"));
}

TEST_F(FuturesTest, AFailureOfTheWorkerIsAnOutcomeAndIsNotRepeated) {
  submit(create("s:m", 7));
  const auto refused = submit(train("s:m", 1, {{kRefused}}));
  EXPECT_EQ(text(refused), "user: refused");
  const auto next = submit(step("s:m", 2, 1));
  const auto before = text(next);
  rig_->kill_worker();
  EXPECT_THAT(text(submit(step("s:m", 3, 1))), HasSubstr("steps=2"));
  EXPECT_EQ(text(refused), "user: refused");
  EXPECT_EQ(text(next), before);
}

TEST_F(FuturesTest, ALoadedCheckpointMayBeDeletedOrOverwritten) {
  const auto dir = options_.dir / "saved";
  options_.futures.housekeeping = milliseconds(20);
  options_.dispatch.snapshot_after_requests = 9;
  start();
  submit(create("s:m", 7));
  submit(train("s:m", 1, {{1, 2}}));
  submit(step("s:m", 2, 1));
  text(submit(save("s:m", 3, dir)));
  Adapter wanted = Adapter::fresh(7);
  wanted.backward(std::vector<std::int32_t>{1, 2});
  wanted.step(1);
  text(submit(step("s:m", 4, 5)));
  text(submit(load("s:m", 5, dir)));
  text(submit(create_from("s:n", dir)));
  std::filesystem::remove_all(dir);
  rig_->kill_worker();
  wanted.step(2);
  const std::string weights = fmt::format("w={:.0f} ", visible(wanted.w));
  EXPECT_THAT(text(submit(step("s:m", 6, 2))), HasSubstr(weights));
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "toy") << "1 2 3 4\n";
  start();
  EXPECT_THAT(text(submit(step("s:n", 1, 2))), HasSubstr(weights));
  wanted.step(3);
  EXPECT_THAT(text(submit(step("s:m", 7, 3))), HasSubstr(fmt::format("w={:.0f} ", visible(wanted.w))));
  // Once a snapshot stands in for them they go.
  for (int seq = 8; seq < 20; ++seq) text(submit(step("s:m", seq, 3)));
  EXPECT_TRUE(rig_->run([&] { return std::filesystem::is_empty(options_.dir / "journal" / "inputs"); }));
}

TEST_F(FuturesTest, ACompletionMayFailAndTheStepStays) {
  rig_->futures->set_completion(Operation::forward_backward, [](const auto&, const auto&, const auto&) -> Outcome {
    throw user_error("cannot encode");
  });
  submit(create("s:m", 7));
  EXPECT_EQ(text(submit(train("s:m", 1, {{1, 2}}))), "user: cannot encode");
  rig_->kill_worker();
  Adapter wanted = Adapter::fresh(7);
  wanted.backward(std::vector<std::int32_t>{1, 2});
  wanted.step(1);
  EXPECT_THAT(text(submit(step("s:m", 2, 1))), HasSubstr(fmt::format("w={:.0f} ", visible(wanted.w))));
}

// As a save does, whose files a slow disk holds up.
TEST_F(FuturesTest, ACompletionMayTakeItsTimeAndHoldsUpNothing) {
  const auto dir = options_.dir / "saved";
  auto slow = std::make_shared<boost::asio::steady_timer>(rig_->io, std::chrono::hours(1));
  const auto wait = [](std::shared_ptr<boost::asio::steady_timer> until) -> boost::asio::awaitable<Outcome> {
    boost::system::error_code woken;
    co_await until->async_wait(boost::asio::redirect_error(boost::asio::use_awaitable, woken));
    co_return Result{"text/plain", "moved"};
  };
  rig_->futures->set_completion(Operation::save_weights,
                                [&](const auto&, const auto&, const auto&) { return wait(slow); });
  submit(create("s:m", 7));
  const auto saved = submit(save("s:m", 1, dir));
  const auto after = submit(step("s:m", 2, 1));
  EXPECT_THAT(text(after), HasSubstr("steps=1"));
  EXPECT_EQ(rig_->poll_once(saved, milliseconds(10)).state, PollState::pending);
  rig_->futures->end_session("t", {}, "finished");
  slow.reset();  // no timer outlives its io_context
  start();       // it was not told: it is done again
  EXPECT_THAT(text(saved), StartsWith("ok"));
  EXPECT_THAT(text(submit(step("s:m", 3, 1))), HasSubstr("steps=2"));
  slow = std::make_shared<boost::asio::steady_timer>(rig_->io, std::chrono::hours(1));
  rig_->futures->set_completion(Operation::save_weights,
                                [&](const auto&, const auto&, const auto&) { return wait(slow); });
  const auto next = submit(save("s:m", 4, dir));
  text(submit(step("s:m", 5, 1)));
  rig_->kill_worker();
  text(submit(step("s:m", 6, 1)));
  slow->cancel();
  EXPECT_EQ(text(next), "moved");
}

TEST_F(FuturesTest, ResultsSurviveTheServerWithoutMemory) {
  options_.futures.memory_bytes = 0;  // all is read again
  start();
  std::vector<std::string> ids{submit(create("s:m", 7))};
  for (int i = 1; i <= 20; ++i) ids.push_back(submit(i % 4 == 0 ? step("s:m", i, i) : train("s:m", i, {{i, 2}, {i}})));
  std::vector<std::string> first;
  for (const auto& id : ids) first.push_back(text(id));
  start();
  for (std::size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(text(ids[i]), first[i]);
  EXPECT_EQ(submit(train("s:m", 1, {{1, 2}, {1}})), ids[1]);
  EXPECT_THAT(text(submit(step("s:m", 21, 1))), HasSubstr("steps=6"));
}

TEST_F(FuturesTest, AFullDiskRefusesTheRequestAndLosesNothing) {
  ASSERT_TRUE(ready());
  text(submit(create("s:m", 7)));
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  rlimit tight = before;
  tight.rlim_cur = std::filesystem::file_size(options_.dir / "journal" / "0000000001.journal");
  ::setrlimit(RLIMIT_FSIZE, &tight);
  EXPECT_THROW(submit(step("s:m", 1, 1)), Unavailable);
  // Room for the request, none for its outcome: the outcome waits.
  tight.rlim_cur += 200;
  ::setrlimit(RLIMIT_FSIZE, &tight);
  const auto id = submit(step("s:m", 1, 1));
  EXPECT_EQ(rig_->poll_once(id, milliseconds(200)).state, PollState::pending);
  ::setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_THAT(text(id), HasSubstr("steps=1"));
  EXPECT_THAT(text(submit(step("s:m", 2, 1))), HasSubstr("steps=2"));
}

TEST_F(FuturesTest, ForgetsAfterRetentionAndStillKnowsTheModels) {
  options_.futures.retention = milliseconds(300);
  options_.futures.housekeeping = milliseconds(50);
  options_.segment_bytes = 2000;
  options_.dispatch.snapshot_after_seconds = 0.05;
  start();
  submit(create("s:m", 7));
  Adapter wanted = Adapter::fresh(7);
  std::string id;
  const auto dir = options_.dir / "v";
  id = submit(publish("s:m", 1, "v", dir));
  for (int i = 2; i <= 60; ++i) {
    id = submit(i % 2 == 0 ? train("s:m", i, {{i}}) : step("s:m", i, i));
    text(id);
    if (i % 2 == 0) wanted.backward(std::vector<std::int32_t>{i});
    if (i % 2 == 1) wanted.step(i);
  }
  rig_->futures->consume("s:m", 62);
  ASSERT_TRUE(rig_->run([&] { return rig_->journal->first_segment() > 1; }));
  ASSERT_TRUE(rig_->run([&] { return rig_->poll_once(id).state == PollState::gone; }));
  for (int round = 0; round < 2; ++round) {
    start();
    EXPECT_GT(rig_->journal->first_segment(), 1u);
    EXPECT_EQ(rig_->poll_once("r1").state, PollState::gone);
    EXPECT_THROW(submit(step("s:m", 5, 1)), Error);
    EXPECT_THROW(submit(step("s:m", 62, 1)), Error);
  }
  const auto next = submit(step("s:m", 61, 9));
  wanted.step(9);
  EXPECT_THAT(text(next), HasSubstr(fmt::format("w={:.0f} ", visible(wanted.w))));
  EXPECT_THAT(text(submit(step("s:m", 63, 9))), HasSubstr("steps=31"));
  EXPECT_THAT(text(submit(sample("s", 1, "v", dir, 5, 1))),
              HasSubstr(std::to_string(sampled(Adapter::fresh(7).w, 5, 0))));
}

TEST_F(FuturesTest, TheWorkersCountersAreAskedFor) {
  const auto refresh = [&] {
    bool over = false;
    boost::asio::co_spawn(rig_->io, rig_->dispatch->refresh_counters(std::chrono::seconds(30)),
                          [&](const std::exception_ptr&) { over = true; });
    return rig_->run([&] { return over; });
  };
  EXPECT_TRUE(refresh());  // not ready: nobody is asked
  EXPECT_FALSE(rig_->dispatch->status(kBase).counters);
  submit(create("s:m", 7));
  text(submit(train("s:m", 1, {{1}, {2}, {3}})));
  EXPECT_TRUE(refresh());
  EXPECT_EQ(rig_->dispatch->status(kBase).counters.value().micro_batches, 2u);
  rig_->kill_worker();
  ASSERT_TRUE(rig_->run([&] { return rig_->dispatch->status(kBase).restarts == 1; }));
  EXPECT_FALSE(rig_->dispatch->status(kBase).counters);
}

TEST_F(FuturesTest, AVersionThatIsDroppedIsReadAgain) {
  ASSERT_TRUE(ready());
  const auto dir = options_.dir / "v";
  submit(create("s:m", 7));
  text(submit(publish("s:m", 1, "v", dir)));
  const std::string first = text(submit(sample("s", 1, "v", dir, 5, 1)));
  std::filesystem::create_directories(dir);
  rig_->futures->drop_version(kBase, "v");
  rig_->futures->drop_version("/models/unknown", "v");
  text(submit(step("s:m", 2, 1)));
  std::ofstream(dir / "toy") << "1 2 3 4\n";
  EXPECT_NE(text(submit(sample("s", 2, "v", dir, 5, 1))), first);
}

// Stopped, moved, started: what is unfinished runs with the files where they are now.
TEST_F(FuturesTest, TheDataDirectoryMayMove) {
  submit(create("s:m", 7));
  submit(train("s:m", 1, {{1, 2}}));
  text(submit(step("s:m", 2, 1)));
  text(submit(save("s:m", 3, options_.dir / "staging" / "a")));
  text(submit(load("s:m", 4, options_.dir / "staging" / "a")));
  text(submit(publish("s:m", 5, "v", options_.dir / "versions" / "v")));
  const std::string sampled = text(submit(sample("s", 1, "v", options_.dir / "versions" / "v", 5, 1)));
  const auto parked = submit(save("s:m", 7, options_.dir / "staging" / "b"));
  const auto from = options_.dir;
  start_elsewhere();
  Adapter wanted = Adapter::fresh(7);
  wanted.backward(std::vector<std::int32_t>{1, 2});
  wanted.step(1);
  wanted.step(6);
  EXPECT_THAT(text(submit(step("s:m", 6, 6))), HasSubstr(fmt::format("w={:.0f} ", visible(wanted.w))));
  EXPECT_THAT(text(parked), StartsWith("ok"));
  EXPECT_TRUE(std::filesystem::exists(options_.dir / "staging" / "b" / "toy"));
  EXPECT_EQ(text(submit(sample("s", 2, "v", options_.dir / "versions" / "v", 5, 1))), sampled);
  EXPECT_FALSE(std::filesystem::exists(from));
}

TEST_F(FuturesTest, ASnapshotIsFoundInAMovedDataDirectory) {
  options_.dispatch.snapshot_after_requests = 3;
  start();
  submit(create("s:m", 7));
  Adapter wanted = Adapter::fresh(7);
  for (int seq = 1; seq <= 6; ++seq) {
    text(submit(step("s:m", seq, seq)));
    wanted.step(seq);
  }
  ASSERT_TRUE(rig_->run([&] { return !rig_->dispatch->snapshot_of(kBase).empty(); }));
  start_elsewhere();
  wanted.step(7);
  EXPECT_THAT(text(submit(step("s:m", 7, 7))), HasSubstr(fmt::format("w={:.0f} ", visible(wanted.w))));
}

}  // namespace
}  // namespace ht::futures::toy
