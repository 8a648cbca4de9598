#include "server/dispatch/lane.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

namespace ht::dispatch {
namespace {

Item item(std::int64_t seq, Kind kind = Kind::train) {
  Item made;
  made.number = 1000 + static_cast<RequestId>(seq);
  made.kind = seq == 0 ? Kind::create : kind;
  made.model = "m";
  made.seq = seq;
  made.bytes = 10;
  return made;
}

std::vector<std::int64_t> send_all(Lane& lane) {
  std::vector<std::int64_t> sent;
  while (Entry* entry = lane.next_to_send()) {
    lane.mark_sent(*entry);
    sent.push_back(entry->item.seq);
  }
  return sent;
}

TEST(Lane, SendsByNumberWhateverTheArrivalOrder) {
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    std::vector<std::int64_t> order(20);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    Lane lane("m");
    std::vector<std::int64_t> sent, wanted;
    for (const std::int64_t seq : order) {
      EXPECT_EQ(lane.state(seq), NumberState::fresh);
      if (seq % 5 == 3) {
        lane.consume(seq);
      } else {
        lane.add(item(seq));
        wanted.push_back(seq);
      }
      EXPECT_NE(lane.state(seq), NumberState::fresh);
      const auto now = send_all(lane);
      sent.insert(sent.end(), now.begin(), now.end());
    }
    std::sort(wanted.begin(), wanted.end());
    EXPECT_EQ(sent, wanted);
    EXPECT_EQ(lane.horizon(), 20);
    EXPECT_EQ(lane.state(3), NumberState::passed);
  }
}

TEST(Lane, ACrashSendsAgainInTheSameOrderWhatIsStillNeeded) {
  std::mt19937 random(11);
  for (int round = 0; round < 200; ++round) {
    Lane lane("m");
    for (std::int64_t seq = 0; seq < 12; ++seq) {
      lane.add(item(seq, seq % 3 == 0 ? Kind::step : seq % 3 == 1 ? Kind::train : Kind::save));
    }
    EXPECT_EQ(send_all(lane).size(), 12u);
    const std::int64_t done = random() % 13;
    std::vector<std::int64_t> wanted;
    for (std::int64_t seq = 0; seq < 12; ++seq) {
      Entry& entry = lane.entries().at(seq);
      if (seq < done) {
        lane.mark_executed(entry);
        entry.item.completed = true;
        entry.item.effect = Effect::done;
        if (!entry.replayable()) {
          lane.erase(seq);
          continue;
        }
      }
      wanted.push_back(seq);
    }
    EXPECT_EQ(lane.in_flight, static_cast<std::size_t>(12 - done));
    EXPECT_EQ(lane.in_flight_bytes, static_cast<std::size_t>(12 - done) * 10);
    EXPECT_EQ(lane.next_to_send(), nullptr);
    if (done < 12) {
      EXPECT_EQ(lane.head()->item.seq, done);
    }
    lane.rewind();
    EXPECT_EQ(send_all(lane), wanted);
  }
}

TEST(Lane, WhatFailedIsNotRunAgain) {
  Entry entry;
  entry.item = item(1);
  entry.item.completed = true;
  EXPECT_FALSE(entry.replayable());
  entry.item.effect = Effect::done;
  EXPECT_TRUE(entry.replayable());
  entry.item.kind = Kind::forward;
  EXPECT_FALSE(entry.replayable());
  entry.mixed = true;
  EXPECT_TRUE(entry.replayable());
  entry.item.kind = Kind::publish;
  EXPECT_TRUE(entry.replayable());
}

TEST(Lane, ClosingTakesWhatWasNotSentAndLetsTheDropFollow) {
  Lane lane("m");
  lane.add(item(0));
  lane.add(item(1));
  send_all(lane);
  lane.add(item(2));
  lane.add(item(4));
  const auto taken = lane.close();
  ASSERT_EQ(taken.size(), 2u);
  EXPECT_EQ(taken[0].item.seq, 2);
  EXPECT_EQ(taken[1].item.seq, 4);
  EXPECT_EQ(lane.state(5), NumberState::closed);
  lane.add(item(kDropSeq, Kind::drop));
  EXPECT_EQ(send_all(lane), std::vector<std::int64_t>{kDropSeq});
  lane.rewind();
  EXPECT_EQ(send_all(lane), (std::vector<std::int64_t>{0, 1, kDropSeq}));
}

TEST(Lane, ARestoredHorizonKeepsItsParkedNumbers) {
  Lane lane("m");
  lane.set_horizon(5);
  lane.consume(6);
  lane.add(item(7));
  EXPECT_TRUE(send_all(lane).empty());
  EXPECT_EQ(lane.state(4), NumberState::passed);
  lane.add(item(5));
  EXPECT_EQ(send_all(lane), (std::vector<std::int64_t>{5, 7}));
  lane.add(item(2));  // known to the journal, needed by the replay
  lane.rewind();
  EXPECT_EQ(send_all(lane), (std::vector<std::int64_t>{2, 5, 7}));
}

}  // namespace
}  // namespace ht::dispatch
