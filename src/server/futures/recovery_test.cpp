// What a recovery owes: the same bits, no request declared guilty by somebody's kill -9, and no silence about a model
// that could not be brought back.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <fstream>

#include "server/futures/test_rig.h"
#include "server/futures/toy_adapter.h"

namespace ht::futures::toy {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

class RecoveryTest : public RigTest {
 protected:
  RecoveryTest() { options_.dispatch.backoff_max = milliseconds(5); }
  // Kills the worker `times` times, each time once it is ready and has had time to begin.
  void kill_again_and_again(int times) {
    for (int i = 0; i < times; ++i) {
      const int restarts = rig_->dispatch->status(kBase).restarts;
      ASSERT_TRUE(rig_->run([&] { return rig_->dispatch->status(kBase).state == dispatch::GroupState::ready; }));
      rig_->run([] { return false; }, std::chrono::seconds(0));
      ::usleep(20000);
      rig_->kill_worker();
      ASSERT_TRUE(rig_->run([&] { return rig_->dispatch->status(kBase).restarts > restarts; }));
    }
  }
  static std::string field(const std::string& text, const std::string& name) {
    const auto at = text.find(name + "=");
    return at == std::string::npos ? "" : text.substr(at + name.size() + 1, text.find(' ', at) - at - name.size() - 1);
  }
  static std::vector<std::vector<std::int32_t>> datums(int count, std::int32_t first) {
    std::vector<std::vector<std::int32_t>> made;
    for (int i = 0; i < count; ++i) made.push_back({first, i});
    return made;
  }
};

// Faults while a long request shares micro-batches with short ones that were answered: what was told stays true, in
// careful mode and after it, whoever restarts.
TEST_F(RecoveryTest, CompositionsAreTheSameAfterCarefulModeAndARestart) {
  options_.backend_config = R"({"delay_us":10000,"compute":0.01})";
  start();
  text(submit(create("s:long", 1)));
  text(submit(create("s:short", 2)));
  const auto before = submit(train("s:long", 1, datums(3, 1)));
  const auto long_one = submit(train("s:long", 2, datums(16, 2)));
  std::vector<std::string> short_ones;
  for (int seq = 1; seq <= 20; ++seq) short_ones.push_back(submit(train("s:short", seq, datums(1, seq))));
  for (int fault = 1; fault <= 3; ++fault) {
    text(short_ones[static_cast<std::size_t>(fault) + 2]);
    ::kill(rig_->dispatch->status(kBase).pid, SIGSEGV);
    ASSERT_TRUE(rig_->run([&] { return rig_->dispatch->status(kBase).restarts == fault; }));
  }
  std::string after;
  for (const auto& id : short_ones) {
    const std::string told = text(id);
    if (!after.empty()) {
      EXPECT_EQ(field(told, "before"), after);
    }
    after = field(told, "after");
  }
  EXPECT_EQ(field(text(long_one), "before"), field(text(before), "after"));
  std::string after_long = field(text(long_one), "after");
  for (int round = 0; round < 3; ++round) {
    if (round == 1) {
      rig_->kill_worker();
    } else {
      start();
    }
    const std::string stepped_long = text(submit(step("s:long", 3 + round, 1)));
    const std::string stepped = text(submit(step("s:short", 21 + round, 1)));
    EXPECT_EQ(field(stepped_long, "before"), after_long) << "round " << round;
    EXPECT_EQ(field(stepped, "before"), after) << "round " << round;
    after_long = field(stepped_long, "after");
    after = field(stepped, "after");
  }
}

// What was begun together is composed anew, one by one: the journal must not bring the first compositions back.
TEST_F(RecoveryTest, WhatCarefulModeComposedAnewStaysSo) {
  options_.backend_config = R"({"delay_us":5000,"compute":0.01})";
  start();
  text(submit(create("s:0", 1)));
  text(submit(create("s:1", 2)));
  const std::vector<std::string> ids{submit(train("s:0", 1, datums(16, 1))), submit(train("s:1", 1, datums(16, 2)))};
  for (int fault = 1; fault <= 2; ++fault) {
    text(submit(create("s:z" + std::to_string(fault), 3)));  // behind the others' creation
    const auto bytes = rig_->journal->bytes();
    if (fault == 1) {
      ASSERT_TRUE(rig_->run([&] { return rig_->journal->bytes() > bytes; }));  // by a micro-batch
    }
    ::kill(rig_->dispatch->status(kBase).pid, SIGSEGV);
    ASSERT_TRUE(rig_->run([&] { return rig_->dispatch->status(kBase).restarts == fault; }));
  }
  std::vector<std::string> after;
  for (const auto& id : ids) after.push_back(field(text(id), "after"));
  for (int round = 0; round < 2; ++round) {
    start();
    for (std::size_t model = 0; model < 2; ++model) {
      const std::string stepped = text(submit(step("s:" + std::to_string(model), 2 + round, 1)));
      EXPECT_EQ(field(stepped, "before"), after[model]) << "round " << round;
      after[model] = field(stepped, "after");
    }
  }
}

TEST_F(RecoveryTest, SomebodysKillsDoNotMakeARequestGuilty) {
  options_.backend_config = R"({"delay_us":150000,"compute":0.01})";
  start();
  text(submit(create("s:m", 7)));
  const auto alone = submit(train("s:m", 1, datums(4, 1)));
  kill_again_and_again(6);
  EXPECT_THAT(text(alone), HasSubstr("g="));
}

TEST_F(RecoveryTest, ARequestThatIsKilledAloneTooOftenFails) {
  options_.backend_config = R"({"delay_us":150000,"compute":0.01})";
  options_.dispatch.max_kills = 3;
  start();
  text(submit(create("s:m", 7)));
  const auto alone = submit(train("s:m", 1, datums(4, 1)));
  kill_again_and_again(3);
  EXPECT_THAT(text(alone), HasSubstr("3 times, the last time: killed by signal 9"));
  EXPECT_THAT(text(submit(step("s:m", 2, 1))), HasSubstr("steps=1"));
}

TEST_F(RecoveryTest, WhatFailsInTheReplayIsToldToLaterRequestsUntilALoad) {
  start();
  const auto dir = options_.dir / "saved";
  text(submit(create("s:n", 8)));
  text(submit(save("s:n", 1, dir)));
  const auto made = submit(create_from("s:m", dir));
  text(submit(step("s:m", 1, 1)));
  text(submit(publish("s:m", 2, "v", options_.dir / "v")));
  std::filesystem::remove(options_.dir / "journal" / "inputs" / made.substr(1) / "toy");
  rig_->kill_worker();
  ASSERT_TRUE(rig_->run([&] { return rig_->dispatch->status(kBase).restarts == 1; }));
  EXPECT_THAT(text(submit(step("s:m", 3, 1))), StartsWith("server: the state of model s:m is lost: its request 0"));
  EXPECT_THAT(text(submit(train("s:m", 4, {{1}}))), StartsWith("server: the state of model s:m is lost"));
  EXPECT_THAT(text(submit(save("s:m", 5, options_.dir / "lost"))),
              StartsWith("server: the state of model s:m is lost"));
  EXPECT_THAT(text(submit(step("s:n", 2, 1))), HasSubstr("steps=1"));
}

// Its record is damaged: the micro-batches that it was in are composed without it, the others as they were.
TEST_F(RecoveryTest, ARequestThatCannotBeReadAgainDoesNotStopTheOthers) {
  options_.futures.memory_bytes = 0;  // all is read again
  options_.backend_config = R"({"delay_us":2000,"compute":0.01})";
  start();
  submit(create("s:m", 7));
  submit(create("s:n", 8));
  std::vector<std::string> ids;
  for (int seq = 1; seq <= 4; ++seq) {
    ids.push_back(submit(train("s:m", seq, {{77001, seq}, {77002}, {77003}})));
    ids.push_back(submit(train("s:n", seq, datums(5, seq))));
  }
  for (const auto& id : ids) text(id);
  const auto saved = options_.dir / "saved";
  text(submit(save("s:n", 5, saved)));
  // Damages the first request that has the token 77001 (a varint).
  const auto file = options_.dir / "journal" / "0000000001.journal";
  std::fstream journal(file, std::ios::in | std::ios::out | std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(journal)), {});
  const auto at = bytes.find("s:m/1");
  ASSERT_NE(at, std::string::npos);
  journal.clear();
  journal.seekp(static_cast<std::streamoff>(at));
  journal.put('X').flush();
  rig_->kill_worker();
  EXPECT_THAT(text(submit(step("s:n", 6, 1))), HasSubstr("steps=1"));
  EXPECT_THAT(text(submit(step("s:m", 5, 1))), StartsWith("server: the state of model s:m is lost: its request 1"));
  EXPECT_THAT(text(submit(load("s:m", 6, saved))), StartsWith("ok"));
  EXPECT_THAT(text(submit(step("s:m", 7, 1))), HasSubstr("steps=1"));
}

// 30 parked requests are no reason for a snapshot of what has hardly changed.
TEST_F(RecoveryTest, SnapshotsCountWhatWasExecuted) {
  options_.dispatch.snapshot_after_requests = 10;
  start();
  text(submit(create("s:m", 7)));
  for (int seq = 10; seq < 40; ++seq) submit(step("s:m", seq, 1));
  for (int seq = 1; seq < 5; ++seq) text(submit(step("s:m", seq, 1)));
  rig_->run([] { return false; }, std::chrono::seconds(0));
  EXPECT_EQ(rig_->dispatch->snapshot_of(kBase), "");
  for (int seq = 5; seq < 10; ++seq) text(submit(step("s:m", seq, 1)));
  EXPECT_TRUE(rig_->run([&] { return !rig_->dispatch->snapshot_of(kBase).empty(); }));
}

TEST_F(RecoveryTest, ASnapshotThatCannotBeUsedIsTriedAgainLessAndLess) {
  options_.dispatch.snapshot_after_requests = 1;
  options_.dispatch.snapshot_retry = milliseconds(1);
  start();
  text(submit(create("s:m", 7)));
  // Nothing can be made where the snapshots of the group would lie.
  const auto root = options_.dir / "snapshots";
  std::filesystem::remove_all(root);
  std::ofstream(root.string()) << "no directory";
  EXPECT_EQ(rig_->dispatch->status(kBase).snapshot_failures, 0);
  for (int seq = 1; seq <= 400; ++seq) text(submit(step("s:m", seq, 1)));
  EXPECT_GE(rig_->dispatch->status(kBase).snapshot_failures, 2);
  EXPECT_LE(rig_->dispatch->status(kBase).snapshot_failures, 20);
}

}  // namespace
}  // namespace ht::futures::toy
