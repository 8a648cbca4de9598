#include "server/store/journal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <iterator>

#include "base/error.h"

namespace ht::store {
namespace {

namespace fs = std::filesystem;

class JournalTest : public ::testing::Test {
 protected:
  JournalTest() : dir_(fs::path(::testing::TempDir()) / ("journal_test_" + std::to_string(::getpid()))) {
    fs::remove_all(dir_);
  }
  ~JournalTest() override { fs::remove_all(dir_); }

  JournalOptions options(std::uint64_t segment_bytes = 1 << 20) const { return {dir_, segment_bytes}; }
  static std::vector<std::string> all(const Journal& journal) {
    std::vector<std::string> records;
    journal.replay([&](const RecordPosition& position, std::string_view payload) {
      EXPECT_EQ(journal.read(position), payload);
      records.emplace_back(payload);
    });
    return records;
  }
  fs::path segment(int number) const {
    const std::string text = std::to_string(number);
    return dir_ / (std::string(10 - text.size(), '0') + text + ".journal");
  }
  static std::string read_file(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  static void write_file(const fs::path& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
  }

  fs::path dir_;
};

TEST_F(JournalTest, KeepsRecordsOverReopening) {
  std::vector<std::string> written = {"one", "", std::string(100000, 'x'), std::string("\0\1\2", 3)};
  {
    Journal journal(options());
    for (const auto& record : written) journal.append(record);
    EXPECT_EQ(all(journal), written);
  }
  Journal journal(options());
  EXPECT_EQ(journal.torn_bytes(), 0u);
  EXPECT_EQ(all(journal), written);
  journal.append("more");
  written.emplace_back("more");
  EXPECT_EQ(all(journal), written);
}

TEST_F(JournalTest, RotatesAndDropsOldSegments) {
  Journal journal(options(100));
  for (int i = 0; i < 50; ++i) journal.append("record " + std::to_string(i));
  EXPECT_GT(journal.current_segment(), 5u);
  EXPECT_EQ(all(journal).size(), 50u);
  journal.drop_before(4);
  EXPECT_EQ(journal.first_segment(), 4u);
  EXPECT_FALSE(fs::exists(segment(3)));
  const auto left = all(journal);
  EXPECT_EQ(left.back(), "record 49");
  EXPECT_LT(left.size(), 50u);
  journal.drop_before(UINT64_MAX);
  EXPECT_EQ(journal.first_segment(), journal.current_segment());
}

TEST_F(JournalTest, CutsATornTailAtEveryByteOfTheLastRecord) {
  std::uint64_t keep = 0;
  {
    Journal journal(options());
    journal.append("first");
    journal.append("second");
    keep = fs::file_size(segment(1));
    journal.append("the last one");
  }
  const std::string whole = read_file(segment(1));
  for (std::size_t size = keep; size < whole.size(); ++size) {
    write_file(segment(1), whole.substr(0, size));
    Journal journal(options());
    EXPECT_EQ(journal.torn_bytes(), size - keep);
    EXPECT_THAT(all(journal), ::testing::ElementsAre("first", "second")) << size;
    journal.append("after");
    EXPECT_THAT(all(journal), ::testing::ElementsAre("first", "second", "after")) << size;
  }
}

TEST_F(JournalTest, RemovesASegmentWithoutAWholeHeader) {
  {
    Journal journal(options());
    journal.append("first");
  }
  for (std::size_t size = 0; size < 28; ++size) {
    write_file(segment(2), std::string(size, 'H'));
    Journal journal(options());
    EXPECT_THAT(all(journal), ::testing::ElementsAre("first"));
    EXPECT_EQ(journal.current_segment(), 1u);
  }
}

TEST_F(JournalTest, ReportsEveryFlippedBitBeforeTheLastRecord) {
  std::uint64_t last = 0;
  {
    Journal journal(options());
    journal.append("first");
    journal.append("second");
    last = fs::file_size(segment(1));
    journal.append("third");
  }
  const std::string whole = read_file(segment(1));
  for (std::size_t bit = 0; bit < whole.size() * 8; ++bit) {
    std::string damaged = whole;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    write_file(segment(1), damaged);
    if (bit / 8 >= last) {  // the last record: taken for torn
      Journal journal(options());
      EXPECT_THAT(all(journal), ::testing::ElementsAre("first", "second")) << bit;
    } else {
      try {
        Journal journal(options());
        FAIL() << "bit " << bit << " was not noticed";
      } catch (const Error& error) {
        EXPECT_EQ(error.category(), ErrorCategory::server);
        EXPECT_THAT(error.what(), ::testing::AllOf(::testing::HasSubstr("damaged at offset"),
                                                   ::testing::HasSubstr(segment(1).string())));
      }
    }
  }
}

TEST_F(JournalTest, ReportsATornRecordInAnOldSegment) {
  {
    Journal journal(options(40));
    for (int i = 0; i < 6; ++i) journal.append("record " + std::to_string(i));
  }
  const std::string whole = read_file(segment(1));
  write_file(segment(1), whole.substr(0, whole.size() - 1));
  EXPECT_THROW(Journal{options(40)}, Error);
  write_file(segment(1), whole);
  fs::remove(segment(2));
  EXPECT_THROW(Journal{options(40)}, Error);
}

TEST_F(JournalTest, BytesOfARecordInsideAPayloadAreNoRecord) {
  std::string image;
  {
    Journal journal(options());
    journal.append("inner");
    image = read_file(segment(1)).substr(28);
  }
  std::uint64_t keep = fs::file_size(segment(1));
  {
    Journal journal(options());
    journal.append(image + image);
  }
  fs::resize_file(segment(1), fs::file_size(segment(1)) - 1);
  Journal journal(options());
  EXPECT_THAT(all(journal), ::testing::ElementsAre("inner"));
  EXPECT_EQ(fs::file_size(segment(1)), keep);
}

TEST_F(JournalTest, AFailedAppendLeavesNothing) {
  Journal journal(options());
  journal.append("first");
  // A full disk, as the kernel tells it: a short write, then an error.
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit tight = before;
  tight.rlim_cur = fs::file_size(segment(1)) + 100;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &tight), 0);
  EXPECT_THROW(journal.append(std::string(5000, 'x')), Error);
  journal.append("small");
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  journal.append(std::string(5000, 'y'));
  EXPECT_THAT(all(journal), ::testing::ElementsAre("first", "small", std::string(5000, 'y')));
}

TEST_F(JournalTest, IsOpenedOnce) {
  Journal journal(options());
  EXPECT_THROW(Journal{options()}, Error);
}

TEST_F(JournalTest, PowerDurabilityWorksTheSame) {
  JournalOptions power = options(100);
  power.durability = Durability::power;
  Journal journal(power);
  for (int i = 0; i < 10; ++i) journal.append("record " + std::to_string(i));
  EXPECT_EQ(all(journal).size(), 10u);
}

}  // namespace
}  // namespace ht::store
