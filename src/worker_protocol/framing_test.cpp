#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "base/error.h"
#include "worker_protocol/codec.h"

namespace ht::worker_protocol {
namespace {

TEST(Framing, LengthIsLittleEndian) {
  EXPECT_EQ(frame("abc"), std::string("\3\0\0\0abc", 7));
}

TEST(Framing, AnyCutOfTheStreamGivesTheSameFrames) {
  std::mt19937 random(3);
  std::vector<std::string> payloads;
  std::string stream;
  for (int i = 0; i < 200; ++i) {
    payloads.emplace_back(i % 7 == 0 ? 0 : random() % 3000, static_cast<char>(i));
    stream += frame(payloads.back());
  }
  for (const std::size_t largest : {std::size_t{1}, std::size_t{7}, std::size_t{5000}, stream.size()}) {
    FrameReader reader;
    std::vector<std::string> read;
    for (std::size_t at = 0; at < stream.size();) {
      const std::size_t size = std::min(stream.size() - at, 1 + random() % largest);
      reader.feed(std::string_view(stream).substr(at, size));
      at += size;
      while (auto payload = reader.next()) read.push_back(std::move(*payload));
    }
    EXPECT_EQ(read, payloads);
  }
}

TEST(Framing, NothingUntilTheFrameIsWhole) {
  FrameReader reader;
  EXPECT_FALSE(reader.next());
  reader.feed(std::string("\2\0\0", 3));
  EXPECT_FALSE(reader.next());
  reader.feed(std::string("\0x", 2));
  EXPECT_FALSE(reader.next());
  reader.feed("y");
  EXPECT_EQ(reader.next(), "xy");
  EXPECT_FALSE(reader.next());
}

TEST(Framing, LargeFramesPass) {
  const std::string payload(5 << 20, 'z');
  FrameReader reader;
  reader.feed(frame(payload) + frame("after"));
  EXPECT_EQ(reader.next(), payload);
  EXPECT_EQ(reader.next(), "after");
}

TEST(Framing, LengthAboveTheLimitIsRefusedBeforeItsBytesCome) {
  FrameReader reader;
  reader.feed(std::string("\1\0\0\x40", 4));
  EXPECT_THROW(reader.next(), Error);
}

}  // namespace
}  // namespace ht::worker_protocol
