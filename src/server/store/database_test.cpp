#include "server/store/database.h"

#include <gmock/gmock.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "base/error.h"

namespace ht::store {
namespace {

namespace fs = std::filesystem;

class DatabaseTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "ht_database_XXXXXX").string();
    dir = ::mkdtemp(pattern.data());
  }
  void TearDown() override { fs::remove_all(dir); }
  fs::path file() const { return dir / "store.sqlite"; }
  static void doom(Database& database, const std::string& name) {
    database.execute("INSERT INTO doomed_dirs (dir) VALUES (?)", {name});
  }
  static std::size_t count(Database& database) { return database.query("SELECT dir FROM doomed_dirs").size(); }

  fs::path dir;
};

TEST_F(DatabaseTest, RowsSurviveAndValuesKeepTheirType) {
  const std::string text("a\0'\"b\xc3\xa9", 7);
  {
    Database database(file());
    doom(database, text);
    EXPECT_EQ(database.execute("UPDATE doomed_dirs SET dir = dir WHERE dir = ?", {text}), 1);
    EXPECT_EQ(database.execute("UPDATE doomed_dirs SET dir = dir WHERE dir = ?", {std::string("x")}), 0);
  }
  Database database(file(), Durability::power);
  const auto rows =
      database.query("SELECT dir, ?, ? FROM doomed_dirs", {std::int64_t{-9'000'000'000'000'000'000}, nullptr});
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_EQ(text_of(rows[0][0]), text);
  EXPECT_EQ(integer_of(rows[0][1]), -9'000'000'000'000'000'000);
  EXPECT_TRUE(std::holds_alternative<std::nullptr_t>(rows[0][2]));
}

TEST_F(DatabaseTest, TransactionIsAllOrNothing) {
  Database database(file());
  EXPECT_THROW(database.transaction([&] {
    doom(database, "a");
    database.transaction([&] { doom(database, "b"); });
    throw server_error("no");
  }),
               Error);
  EXPECT_EQ(count(database), 0u);
  database.transaction([&] {
    doom(database, "a");
    database.transaction([&] { doom(database, "b"); });
  });
  EXPECT_EQ(count(database), 2u);
}

TEST_F(DatabaseTest, FailedStatementsAreErrorsAndLeaveItUsable) {
  Database database(file());
  doom(database, "a");
  try {
    doom(database, "a");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::server);
    EXPECT_THAT(error.what(), testing::HasSubstr("UNIQUE"));
  }
  EXPECT_THROW(database.query("SELECT nothing FROM nowhere"), Error);
  doom(database, "b");
  EXPECT_EQ(count(database), 2u);
}

// A process that dies without closing anything.
TEST_F(DatabaseTest, CommittedRowsSurviveSuddenDeath) {
  const pid_t child = ::fork();
  if (child == 0) {
    auto* database = new Database(file());
    doom(*database, "kept");
    database->transaction([&] {
      doom(*database, "lost");
      ::_exit(0);
    });
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  Database database(file());
  const auto rows = database.query("SELECT dir FROM doomed_dirs");
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_EQ(text_of(rows[0][0]), "kept");
}

TEST_F(DatabaseTest, ForeignFilesAreRefused) {
  {
    Database database(file());
    database.execute("PRAGMA user_version = 99");
  }
  try {
    Database database(file());
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
    EXPECT_THAT(error.what(), testing::HasSubstr("newer hosted-tinker (its version is 99"));
  }
  std::ofstream(dir / "text") << std::string(4096, 'x');
  try {
    Database database(dir / "text");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
  }
  EXPECT_THROW(Database(dir / "absent" / "x"), Error);
}

}  // namespace
}  // namespace ht::store
