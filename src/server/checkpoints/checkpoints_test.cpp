#include "server/checkpoints/checkpoints.h"

#include <gmock/gmock.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>

#include <fstream>
#include <optional>
#include <thread>

#include "base/error.h"
#include "server/checkpoints/files.h"
#include "server/store/database.h"
#include "server/store/file_work.h"

namespace ht::checkpoints {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;
using testing::ElementsAre;
using testing::HasSubstr;

const TinkerPath kPath{"s:train:0", Kind::weights, "0001"};

class CheckpointsTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "ht_checkpoints_XXXXXX").string();
    dir = ::mkdtemp(pattern.data());
    restart();
  }
  void TearDown() override {
    checkpoints.reset();
    file_work.reset();
    database.reset();
    fs::remove_all(dir);
  }
  void restart() {
    checkpoints.reset();
    file_work.reset();
    database.reset();
    database = std::make_unique<store::Database>(dir / "store.sqlite");
    file_work = std::make_unique<store::FileWork>(io);
    checkpoints = make_checkpoints(*database, *file_work, dir);
    finish_behind();
  }
  // What is removed behind is gone.
  void finish_behind() {
    io.restart();
    io.run();
  }
  // What the worker does.
  void write(const std::string& request, const std::string& content) {
    std::ofstream(checkpoints->stage(request) / "adapter_model.safetensors") << content;
  }
  Checkpoint fields(const std::string& request, const TinkerPath& path = kPath) {
    Checkpoint c;
    c.path = path;
    c.request_id = request;
    c.base_model = "Qwen/Qwen3-8B";
    c.base_dir = "/models/q";
    c.lora = {.rank = 8, .seed = 0xffffffffffffffff, .train_attn = true, .train_mlp = false, .train_unembed = true};
    c.user_metadata = {{"k", "v \""}};
    return c;
  }
  Checkpoint save(const std::string& request, const TinkerPath& path = kPath, bool overwrite = false) {
    write(request, "content of " + request);
    return commit(fields(request, path), overwrite);
  }
  Checkpoint commit(Checkpoint checkpoint, bool overwrite) {
    std::optional<Checkpoint> made;
    std::exception_ptr thrown;
    boost::asio::co_spawn(io, checkpoints->commit(std::move(checkpoint), overwrite),
                          [&](const std::exception_ptr& failure, std::optional<Checkpoint> result) {
                            thrown = failure;
                            made = std::move(result);
                          });
    finish_behind();
    if (thrown) std::rethrow_exception(thrown);
    return made.value();
  }
  Checkpoint save_elsewhere() { return save("r0", {"other", Kind::weights, "x"}); }
  static std::string read(const Checkpoint& c) {
    std::ifstream stream(c.dir / "adapter_model.safetensors");
    return std::string(std::istreambuf_iterator<char>(stream), {});
  }
  static std::size_t entries(const fs::path& path) {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(path), fs::directory_iterator()));
  }
  std::vector<std::string> names(const std::vector<Checkpoint>& list) {
    std::vector<std::string> result;
    for (const Checkpoint& c : list) result.push_back(c.path.name);
    return result;
  }

  fs::path dir;
  boost::asio::io_context io{1};
  std::unique_ptr<store::Database> database;
  std::unique_ptr<store::FileWork> file_work;
  std::unique_ptr<Checkpoints> checkpoints;
};

TEST_F(CheckpointsTest, CommittedCheckpointSurvivesARestartWhole) {
  Checkpoint wanted = fields("r1");
  wanted.expires_at = Clock::now() + 1h;
  write("r1", "12345");
  const Checkpoint made = commit(wanted, false);
  EXPECT_EQ(read(made), "12345");
  EXPECT_TRUE(fs::exists(made.dir / "checkpoint_complete"));
  EXPECT_EQ(made.size_bytes, 5u);
  EXPECT_LT(Clock::now() - made.created_at, 1min);
  EXPECT_EQ(entries(dir / "staging"), 0u);
  restart();
  const Checkpoint kept = checkpoints->find(kPath).value();
  EXPECT_EQ(kept.path.str(), kPath.str());
  EXPECT_EQ(kept.dir, made.dir);
  EXPECT_EQ(kept.created_at, made.created_at);
  EXPECT_EQ(kept.expires_at, made.expires_at);
  EXPECT_EQ(kept.size_bytes, 5u);
  EXPECT_EQ(kept.user_metadata, wanted.user_metadata);
  EXPECT_EQ(kept.base_model, "Qwen/Qwen3-8B");
  EXPECT_EQ(kept.base_dir, "/models/q");
  EXPECT_EQ(kept.lora, wanted.lora);
  EXPECT_EQ(kept.request_id, "r1");
  EXPECT_FALSE(kept.is_public);
  EXPECT_EQ(read(kept), "12345");
  EXPECT_FALSE(checkpoints->find({"s:train:0", Kind::sampler_weights, "0001"}));
}

TEST_F(CheckpointsTest, TakenNameNeedsOverwrite) {
  const Checkpoint first = save("r1");
  EXPECT_NO_THROW(checkpoints->check_free(kPath, false, "r1"));
  EXPECT_NO_THROW(checkpoints->check_free(kPath, true, "r2"));
  try {
    save("r2");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
    EXPECT_THAT(error.what(), HasSubstr(kPath.str() + " exists already"));
  }
  EXPECT_EQ(entries(dir / "staging"), 0u);
  EXPECT_EQ(read(*checkpoints->find(kPath)), "content of r1");

  write("r3", "new");
  Checkpoint other = fields("r3");
  other.user_metadata = {{"other", "x"}};
  commit(other, true);
  const Checkpoint now = checkpoints->find(kPath).value();
  EXPECT_EQ(read(now), "new");
  EXPECT_EQ(now.user_metadata, other.user_metadata);
  EXPECT_FALSE(fs::exists(first.dir));
  EXPECT_EQ(checkpoints->list_run("s:train:0").size(), 1u);
  restart();
  EXPECT_EQ(read(*checkpoints->find(kPath)), "new");
  EXPECT_THROW(checkpoints->check_free({"r", Kind::weights, ".."}, true, "x"), Error);
}

TEST_F(CheckpointsTest, RepeatedCommitChangesNothing) {
  const Checkpoint made = save("r1");
  for (int round = 0; round < 2; ++round) {
    EXPECT_EQ(commit(fields("r1"), false).dir, made.dir);
    // The worker may have written again, too.
    write("r1", "again");
    EXPECT_EQ(commit(fields("r1"), false).created_at, made.created_at);
    EXPECT_EQ(read(made), "content of r1");
    EXPECT_EQ(entries(dir / "staging"), 0u);
    restart();
  }
}

TEST_F(CheckpointsTest, CrashBetweenMovingAndRegistering) {
  save("r0");
  write("r1", "new");
  Files(dir).place(kPath, "r1");
  restart();
  EXPECT_EQ(read(*checkpoints->find(kPath)), "content of r0");  // the old one until the new is registered
  const Checkpoint made = commit(fields("r1"), true);
  EXPECT_EQ(read(made), "new");

  // The same, with the worker's files written again before the repeat.
  write("r2", "newer");
  Files(dir).place(kPath, "r2");
  restart();
  write("r2", "newer");
  EXPECT_EQ(read(commit(fields("r2"), true)), "newer");
  EXPECT_EQ(entries(dir / "staging"), 0u);
  EXPECT_EQ(entries(dir / "checkpoints" / "s:train:0" / "weights"), 1u);
}

TEST_F(CheckpointsTest, CrashBeforeMoving) {
  write("r1", "x");
  std::ofstream(dir / "staging" / "r1" / "checkpoint_complete");
  restart();
  EXPECT_FALSE(checkpoints->find(kPath));
  write("r1", "x");
  EXPECT_EQ(read(commit(fields("r1"), false)), "x");
}

TEST_F(CheckpointsTest, CrashInMidDeletion) {
  const Checkpoint made = save("r1");
  database->execute("DELETE FROM checkpoints");
  database->execute("INSERT INTO doomed_dirs (dir) VALUES (?)",
                    {"checkpoints/" + made.dir.lexically_relative(dir / "checkpoints").string()});
  ASSERT_TRUE(fs::exists(made.dir));
  restart();
  EXPECT_FALSE(fs::exists(made.dir));
  EXPECT_EQ(entries(dir / "checkpoints"), 0u);
  EXPECT_TRUE(database->query("SELECT dir FROM doomed_dirs").empty());
}

TEST_F(CheckpointsTest, NothingStagedIsAnError) {
  EXPECT_THROW(commit(fields("r9"), false), Error);
  EXPECT_FALSE(checkpoints->find(kPath));
  for (const char* id : {"", "..", "a/b", "a~b"}) EXPECT_THROW(checkpoints->stage(id), Error) << id;
}

TEST_F(CheckpointsTest, ListsAreNewestFirstInPages) {
  save("r1", {"a", Kind::weights, "1"});
  save("r2", {"b", Kind::weights, "2"});
  save("r3", {"a", Kind::sampler_weights, "3"});
  save("r4", {"a", Kind::weights, "1"}, true);  // an overwriting save is a new checkpoint
  std::size_t total = 0;
  for (int round = 0; round < 2; ++round) {
    EXPECT_THAT(names(checkpoints->list(2, 0, &total)), ElementsAre("1", "3"));
    EXPECT_EQ(total, 3u);
    EXPECT_THAT(names(checkpoints->list(9, 2, nullptr)), ElementsAre("2"));
    EXPECT_THAT(names(checkpoints->list_run("a")), ElementsAre("1", "3"));
    EXPECT_THAT(names(checkpoints->list_run("c")), ElementsAre());
    restart();
  }
}

TEST_F(CheckpointsTest, RemoveDeletesTheFiles) {
  const Checkpoint made = save("r1");
  EXPECT_TRUE(checkpoints->remove(kPath));
  finish_behind();
  EXPECT_FALSE(checkpoints->remove(kPath));
  EXPECT_FALSE(fs::exists(made.dir));
  EXPECT_EQ(entries(dir / "checkpoints"), 0u);
  save("r2");
  EXPECT_TRUE(checkpoints->find(kPath));
}

TEST_F(CheckpointsTest, TtlHidesAtOnceAndExpireDeletes) {
  const Checkpoint made = save("r1");
  save("r2", {"s:train:0", Kind::weights, "kept"});
  EXPECT_TRUE(checkpoints->set_ttl(kPath, 3600s));
  EXPECT_GT(*checkpoints->find(kPath)->expires_at, Clock::now() + 59min);
  EXPECT_TRUE(checkpoints->set_ttl(kPath, std::nullopt));
  restart();
  EXPECT_FALSE(checkpoints->find(kPath)->expires_at);
  checkpoints->expire();
  finish_behind();
  EXPECT_TRUE(checkpoints->find(kPath));

  EXPECT_TRUE(checkpoints->set_ttl(kPath, 0s));
  std::this_thread::sleep_for(2ms);
  EXPECT_FALSE(checkpoints->find(kPath));
  EXPECT_FALSE(checkpoints->set_ttl(kPath, 3600s));
  EXPECT_FALSE(checkpoints->set_public(kPath, true));
  EXPECT_FALSE(checkpoints->remove(kPath));
  std::size_t total = 0;
  EXPECT_THAT(names(checkpoints->list(9, 0, &total)), ElementsAre("kept"));
  EXPECT_EQ(total, 1u);
  EXPECT_NO_THROW(checkpoints->check_free(kPath, false, "r3"));
  restart();
  checkpoints->expire();
  finish_behind();
  EXPECT_FALSE(fs::exists(made.dir));
  EXPECT_THAT(names(checkpoints->list_run("s:train:0")), ElementsAre("kept"));
}

TEST_F(CheckpointsTest, PublicIsKept) {
  save("r1");
  EXPECT_TRUE(checkpoints->set_public(kPath, true));
  restart();
  EXPECT_TRUE(checkpoints->find(kPath)->is_public);
  EXPECT_TRUE(checkpoints->set_public(kPath, false));
  EXPECT_FALSE(checkpoints->find(kPath)->is_public);
  EXPECT_FALSE(checkpoints->set_public({"x", Kind::weights, "y"}, true));
}

TEST_F(CheckpointsTest, VersionDirectories) {
  const fs::path version = checkpoints->version_dir("s:sample:3");
  EXPECT_TRUE(fs::is_directory(version));
  EXPECT_EQ(checkpoints->version_dir("s:sample:3"), version);
  checkpoints->version_dir("t:sample:3");
  checkpoints->sweep_versions([](const std::string& name) { return name == "t:sample:3"; });
  finish_behind();
  EXPECT_FALSE(fs::exists(version));
  EXPECT_TRUE(fs::exists(dir / "versions" / "t:sample:3"));
  EXPECT_THROW(checkpoints->version_dir("../x"), Error);
}

// A commit that the disk holds up (here: a FIFO that nobody reads yet) holds up nothing else, and those behind it keep
// their order.
TEST_F(CheckpointsTest, ASlowDiskHoldsUpTheCommitAlone) {
  write("r1", "first");
  const fs::path marker = checkpoints->stage("r1") / kCompleteMarker;
  ASSERT_EQ(::mkfifo(marker.c_str(), 0600), 0);
  write("r2", "second");
  const Checkpoint old = save_elsewhere();
  std::vector<std::string> order;
  for (const char* id : {"r1", "r2"}) {
    boost::asio::co_spawn(io, checkpoints->commit(fields(id), true),
                          [&order, id](const std::exception_ptr& failure, const Checkpoint&) {
                            order.push_back(failure ? "failed" : id);
                          });
  }
  io.restart();
  while (io.poll() > 0) continue;
  EXPECT_TRUE(order.empty());
  EXPECT_FALSE(checkpoints->find(kPath));
  EXPECT_TRUE(checkpoints->find(old.path));
  EXPECT_TRUE(checkpoints->remove(old.path));
  EXPECT_FALSE(checkpoints->find(old.path));
  const int reader = ::open(marker.c_str(), O_RDONLY | O_NONBLOCK);
  finish_behind();
  ::close(reader);
  EXPECT_THAT(order, ElementsAre("r1", "r2"));
  EXPECT_EQ(read(*checkpoints->find(kPath)), "second");
  EXPECT_FALSE(fs::exists(old.dir));
}

TEST_F(CheckpointsTest, OfTwoSavesUnderOneNameTheSecondFails) {
  write("r1", "first");
  write("r2", "second");
  int failed = 0;
  for (const char* id : {"r1", "r2"}) {
    boost::asio::co_spawn(
        io, checkpoints->commit(fields(id), false),
        [&failed](const std::exception_ptr& failure, const Checkpoint&) { failed += failure ? 1 : 0; });
  }
  finish_behind();
  EXPECT_EQ(failed, 1);
  EXPECT_EQ(read(*checkpoints->find(kPath)), "first");
  EXPECT_EQ(entries(dir / "checkpoints" / "s:train:0" / "weights"), 1u);
}

TEST_F(CheckpointsTest, TheDataDirectoryMayMove) {
  const Checkpoint made = save("r1");
  checkpoints.reset();
  file_work.reset();
  database.reset();
  const fs::path moved = dir.string() + "_moved";
  fs::rename(dir, moved);
  dir = moved;
  restart();
  const Checkpoint kept = checkpoints->find(kPath).value();
  EXPECT_EQ(read(kept), "content of r1");
  EXPECT_TRUE(checkpoints->remove(kPath));
  finish_behind();
  EXPECT_FALSE(fs::exists(kept.dir));
}

TEST_F(CheckpointsTest, AStartEmptiesTheStagingDirectory) {
  write("r1", "of a save that failed");
  restart();
  EXPECT_EQ(entries(dir / "staging"), 0u);
}

}  // namespace
}  // namespace ht::checkpoints
