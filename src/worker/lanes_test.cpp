#include "worker/lanes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>

namespace ht::worker {
namespace {

namespace wp = worker_protocol;

TEST(Lane, AReplyTooLargeForAFrameBecomesAFailureOfItsRequest) {
  std::array<int, 2> pair;
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, pair.data()), 0);
  Lane lane(pair[0], {[](const wp::Request&) {}, [](const std::string&) {}}, 1000);
  wp::SampleResult large;
  large.sequences.resize(1);
  large.sequences[0].logprobs.resize(300);
  lane.send({5, wp::Done{large}});
  large.sequences[0].logprobs.resize(3);
  lane.send({6, wp::Done{large}});

  wp::FrameReader frames;
  std::vector<wp::Reply> replies;
  while (replies.size() < 2) {
    char buffer[4096];
    const ssize_t count = ::read(pair[1], buffer, sizeof buffer);
    ASSERT_GT(count, 0);
    frames.feed({buffer, static_cast<std::size_t>(count)});
    while (const auto payload = frames.next()) replies.push_back(wp::decode_reply(*payload));
  }
  EXPECT_EQ(replies[0].id, 5u);
  EXPECT_THAT(std::get<wp::Failure>(replies[0].body).message,
              testing::AllOf(testing::HasSubstr("1000"), testing::HasSubstr("bytes")));
  EXPECT_EQ(replies[1], (wp::Reply{6, wp::Done{large}}));
  ::close(pair[1]);
}

}  // namespace
}  // namespace ht::worker
