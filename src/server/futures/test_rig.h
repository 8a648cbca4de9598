#pragma once

// For tests: journal, dispatch and futures over toy workers, in this process.

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/futures/journalled_futures.h"

namespace ht::futures::toy {

inline constexpr const char* kBase = "/models/toy";

struct RigOptions {
  std::filesystem::path dir;  // data directory
  Options futures;
  dispatch::Options dispatch;
  std::uint64_t segment_bytes = 1 << 20;
  std::size_t max_record_bytes = std::size_t{1} << 30;
  std::string backend_config = R"({"delay_us":0,"compute":0.01})";
  std::string model_dir = kBase;
};

class Rig {
 public:
  // Recovers from `options.dir`; the workers are started.
  explicit Rig(RigOptions options);
  ~Rig();

  boost::asio::io_context io;
  std::optional<store::Journal> journal;
  std::optional<dispatch::Dispatch> dispatch;
  std::unique_ptr<JournalledFutures> futures;

  // Runs the loop until `until` holds; false when it does not within the time.
  bool run(const std::function<bool()>& until, std::chrono::seconds limit = std::chrono::seconds(20));
  // The outcome, polled for.
  Outcome result(const std::string& request_id);
  // Its text, or "<category>: <message>" of a failure.
  std::string text(const std::string& request_id);
  Poll poll_once(const std::string& request_id, std::chrono::milliseconds timeout = std::chrono::milliseconds(0));
  void kill_worker();
};

// A rig in a data directory of its own, which the end of the test removes. Tests may change options_ before start().
class RigTest : public ::testing::Test {
 protected:
  RigTest();
  ~RigTest() override;
  // Ends the rig that runs, if one does, and starts one on the same directory.
  void start();
  std::string submit(Submission submission) { return rig_->futures->submit(std::move(submission)).request_id; }
  std::string text(const std::string& id) { return rig_->text(id); }

  RigOptions options_;
  std::unique_ptr<Rig> rig_;
};

// Submissions of one model.
Submission create(const std::string& model, std::uint64_t seed);
Submission train(const std::string& model, std::int64_t seq, std::vector<std::vector<std::int32_t>> datums,
                 bool forward_only = false);
Submission step(const std::string& model, std::int64_t seq, double learning_rate);
Submission save(const std::string& model, std::int64_t seq, const std::filesystem::path& dir);
Submission load(const std::string& model, std::int64_t seq, const std::filesystem::path& dir);
Submission create_from(const std::string& model, const std::filesystem::path& dir);
Submission publish(const std::string& model, std::int64_t seq, const std::string& version,
                   const std::filesystem::path& dir);
Submission sample(const std::string& session, std::int64_t seq, const std::string& version,
                  const std::filesystem::path& dir, std::uint64_t seed, int max_tokens = 4);

std::string text_of(const Outcome& outcome);

}  // namespace ht::futures::toy
