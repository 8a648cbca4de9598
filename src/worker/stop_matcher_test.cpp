#include "worker/stop_matcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"

namespace ht::worker {
namespace {

using testing::HasSubstr;

std::string u32(std::uint32_t value) {
  std::string bytes;
  for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<char>(value >> (8 * i)));
  return bytes;
}
std::string table_bytes(const std::vector<std::string>& tokens) {
  std::string bytes = "HTTT" + u32(1) + u32(static_cast<std::uint32_t>(tokens.size()));
  for (const std::string& token : tokens)
    bytes += std::string(1, '\0') + u32(static_cast<std::uint32_t>(token.size())) + token;
  return bytes;
}

class TokenTableTest : public testing::Test {
 protected:
  TokenTableTest() {
    file_ = std::filesystem::temp_directory_path() / ("ht_token_table_" + std::to_string(::getpid()));
  }
  ~TokenTableTest() override { std::filesystem::remove(file_); }
  TokenTable read(const std::string& bytes) {
    std::ofstream(file_, std::ios::binary) << bytes;
    return TokenTable::read(file_);
  }
  std::string refusal(const std::string& bytes) {
    try {
      read(bytes);
    } catch (const Error& error) {
      EXPECT_EQ(error.category(), ErrorCategory::user);
      EXPECT_THAT(error.what(), HasSubstr(file_.string()));
      return error.what();
    }
    return "accepted";
  }
  std::filesystem::path file_;
};

TEST_F(TokenTableTest, GivesTheBytesOfEveryToken) {
  const std::string not_utf8("\xff\0\x80", 3);
  const TokenTable table = read(table_bytes({"a", "", not_utf8, "<|end|>"}));
  EXPECT_EQ(table.size(), 4);
  EXPECT_EQ(table.bytes(0), "a");
  EXPECT_EQ(table.bytes(1), "");
  EXPECT_EQ(table.bytes(2), not_utf8);
  EXPECT_EQ(table.bytes(3), "<|end|>");
  EXPECT_EQ(table.bytes(4), "");
  EXPECT_EQ(table.bytes(-1), "");
  EXPECT_EQ(read(table_bytes({})).size(), 0);
}

TEST_F(TokenTableTest, EveryBrokenFileIsRefusedByName) {
  const std::string whole = table_bytes({"one", "two"});
  for (std::size_t length = 0; length < whole.size(); ++length) {
    EXPECT_NE(refusal(whole.substr(0, length)), "accepted") << length;
  }
  EXPECT_THAT(refusal(whole + "x"), HasSubstr("1 bytes follow"));
  EXPECT_THAT(refusal("HTTX" + whole.substr(4)), HasSubstr("HTTT"));
  EXPECT_THAT(refusal("HTTT" + u32(2) + whole.substr(8)), HasSubstr("version 2"));
  EXPECT_THAT(refusal("HTTT" + u32(1) + u32(0xffffffff)), HasSubstr("4294967295"));
  EXPECT_THAT(refusal("HTTT" + u32(1) + u32(1) + std::string(1, '\0') + u32(0xffffffff)), HasSubstr("token 0"));
  EXPECT_THROW(TokenTable::read("/nowhere/table"), Error);
}

// The index of the token that completes a stop, or -1.
int stops_at(const TokenTable& table, const std::vector<std::string>& stops, const std::vector<std::int32_t>& tokens) {
  StopMatcher matcher(stops, &table);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (matcher.feed(tokens[i])) return static_cast<int>(i);
  }
  return -1;
}

TEST_F(TokenTableTest, AStopIsFoundWhereverTokensCutIt) {
  const TokenTable table = read(table_bytes({"a", "b", "ab", "aab", "xabcx", "c", ""}));
  EXPECT_EQ(stops_at(table, {"abc"}, {0, 1, 5}), 2);
  EXPECT_EQ(stops_at(table, {"abc"}, {2, 5}), 1);
  EXPECT_EQ(stops_at(table, {"abc"}, {0, 4}), 1) << "inside one token";
  EXPECT_EQ(stops_at(table, {"abc"}, {3, 6, 5}), 2) << "after a false start, with an empty token between";
  EXPECT_EQ(stops_at(table, {"aab"}, {0, 0, 0, 1}), 3) << "overlapping starts";
  EXPECT_EQ(stops_at(table, {"abc"}, {0, 1, 0, 5}), -1);
  EXPECT_EQ(stops_at(table, {"abc", "b"}, {0, 1, 5}), 1) << "the stop that comes first, not the longest";
  EXPECT_EQ(stops_at(table, {"a"}, {1, 5, 99, -1, 0}), 4) << "ids outside the table add nothing";
  EXPECT_EQ(stops_at(table, {}, {0, 1, 5}), -1);
}

TEST_F(TokenTableTest, AMatchLiesWithinOneSample) {
  const TokenTable table = read(table_bytes({"a", "b"}));
  const std::vector<std::string> stops = {"ab"};
  StopMatcher first(stops, &table), second(stops, &table);
  EXPECT_FALSE(first.feed(0));
  EXPECT_FALSE(second.feed(1));
  EXPECT_TRUE(first.feed(1));
}

}  // namespace
}  // namespace ht::worker
