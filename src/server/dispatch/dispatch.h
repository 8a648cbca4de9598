#pragma once

// Which work may run, and where: one lane a model, executed by number whatever the order of arrival; a worker group a
// base model, started, watched, restarted and brought back to where it was. What a request means to a client, and the
// journal, are the business of futures.

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "worker_protocol/messages.h"

namespace ht::dispatch {

using worker_protocol::RequestId;

// One worker group: the base model in `base_dir`.
struct GroupOptions {
  std::string base_dir;  // canonical
  std::string name;      // for logs and reasons
  std::filesystem::path worker_program;
  std::vector<std::string> worker_arguments;  // before those that name its lanes
  std::filesystem::path worker_log;           // empty: stderr
  worker_protocol::Initialize initialize;
};

struct Options {
  std::filesystem::path snapshot_dir;                         // a directory a group below it
  double snapshot_after_seconds = 60.0;                       // of compute since the last cut: what a replay would cost
  std::size_t snapshot_after_bytes = std::size_t{512} << 20;  // of requests since the last cut
  std::size_t snapshot_after_requests = 20000;                // executed since
  std::chrono::milliseconds snapshot_retry{1000};             // after one that could not be used; doubles each time
  std::chrono::milliseconds snapshot_retry_max{300000};
  std::size_t model_in_flight = 64;  // requests sent ahead to the worker, per model
  std::size_t model_in_flight_bytes = std::size_t{64} << 20;
  std::size_t samples_in_flight = 512;
  std::size_t samples_in_flight_bytes = std::size_t{64} << 20;
  // Deaths of a worker that runs one request alone until that request fails: by a fault (the kernel's out-of-memory
  // killer among them), and by a SIGKILL or SIGTERM that may have come from anywhere.
  int max_crashes = 3;
  int max_kills = 12;
  std::chrono::milliseconds backoff_first{200};
  std::chrono::milliseconds backoff_max{30000};
  std::chrono::milliseconds stop_grace{2000};
};

enum class Kind : std::uint8_t { create, load, train, forward, step, save, publish, drop, sample };
// Changes the adapter, or makes a version: a recovery runs it again although its result was delivered.
bool changes_state(Kind kind);

// What a request did to its adapter, and a recovery must see again.
enum class Effect : std::uint8_t {
  none,
  done,
  refused,  // the worker failed it, and that has an effect of its own: a refused step clears the gradient
};

// A request as dispatch knows it: its body stays with futures (in memory or on disk) until it is sent.
struct Item {
  RequestId number = 0;
  Kind kind = Kind::train;
  std::string base_dir;
  std::string model;             // the lane; empty for a sample
  std::int64_t seq = 0;          // place in the lane: 0 create, kDropSeq drop
  std::size_t bytes = 0;         // of the encoded request
  std::string version;           // publish: the version made; sample: the version read
  bool completed = false;        // recovery: its outcome is in the journal
  Effect effect = Effect::none;  // recovery: and what it did
};
inline constexpr std::int64_t kDropSeq = INT64_MAX;

// `item` with the fields that follow from the body.
Item describe(Item item, const worker_protocol::RequestBody& body);

enum class GroupState { stopped, loading, restoring, ready, waiting };  // waiting: for the next start, after a crash
struct GroupStatus {
  GroupState state = GroupState::stopped;
  double progress = 0;     // of loading, 0…1
  std::string text;        // "loading the base model", …: queue_state_reason while not ready
  std::string last_error;  // of the last exit or failed start
  bool refused = false;    // by the worker, as wrong input: it was never ready, and another start would end alike
  int restarts = 0;
  int snapshot_failures = 0;
  std::optional<worker_protocol::WorkerInfo> info;        // of the running or the last worker
  std::optional<worker_protocol::StatusResult> counters;  // of the running worker, when it was asked last
  int pid = 0;                                            // 0: none
};

struct LaneCounts {
  std::size_t parked = 0;   // a lower number is missing
  std::size_t queued = 0;   // may run, not yet with the worker
  std::size_t running = 0;  // with the worker
};

// A cut that may stand in for the requests inside it.
struct SnapshotCut {
  std::string dir;                              // below Options::snapshot_dir
  std::map<std::string, std::int64_t> covered;  // model → the last number inside
};

enum class NumberState {
  fresh,
  passed,
  taken,
  closed
};  // passed: below the horizon; taken: parked, queued or consumed

// All calls and events on the io_context's thread.
class Dispatch {
 public:
  struct Events {
    std::function<worker_protocol::RequestBody(RequestId)> body;
    std::function<void(RequestId, worker_protocol::DoneBody)> done;
    std::function<void(RequestId, worker_protocol::Failure, Effect)> failed;
    // Called before the results that the micro-batch touches.
    std::function<void(const std::string& base_dir, const worker_protocol::MicroBatch&)> micro_batch;
    // These replace all micro-batches told before: some were composed again.
    std::function<void(const std::string& base_dir, const std::vector<worker_protocol::MicroBatch>&)> compositions;
    // Journals the cut. When it throws, the cut is not used.
    std::function<void(const std::string& base_dir, const SnapshotCut&)> snapshot;
  };

  Dispatch(boost::asio::io_context& io, Options options, std::vector<GroupOptions> groups);
  ~Dispatch();

  void set_events(Events events);
  // Starts all workers. Before it, lanes may be filled (recovery).
  void start();
  // Stops all workers.
  void stop();

  bool has_group(const std::string& base_dir) const;
  GroupStatus status(const std::string& base_dir) const;
  std::vector<std::pair<GroupOptions, GroupStatus>> groups() const;
  // Asks each worker that is ready for its counters and waits for the answer, at most `limit`.
  boost::asio::awaitable<void> refresh_counters(std::chrono::milliseconds limit);
  // Sent to the worker now and after each restart.
  void set_token_table(const std::string& base_dir, const std::string& path);

  NumberState number_state(const std::string& model, std::int64_t seq) const;
  // Every accepted request of the model that is not done waits for this number.
  bool all_wait_for(const std::string& model, std::int64_t seq) const;
  void submit(const Item& item);
  // The number will never come. False: there is no such lane.
  bool consume(const std::string& model, std::int64_t seq);
  // The outcome is journalled.
  void completed(RequestId number, Effect effect);
  // Samples only: out of the queue, or cancelled at the worker.
  void cancel_sample(RequestId number);
  // Takes out what is not with the worker yet and closes the lane to all but the drop. Returns what was taken.
  std::vector<RequestId> close_lane(const std::string& model);
  // The worker lets go of weights that nobody samples from.
  void drop_version(const std::string& base_dir, const std::string& version);
  // The group that the model's lane is in; empty: there is no such lane.
  std::string base_dir_of(const std::string& model) const;

  // A request that a recovery would need again.
  bool needed(RequestId number) const;
  LaneCounts counts() const;
  std::size_t queued_samples() const;

  // For the journal's digest of old segments.
  struct LaneState {
    std::string base_dir, model;
    std::int64_t horizon = 0;  // every lower number was released
    std::vector<std::int64_t> consumed;
    std::vector<std::string> versions;
    bool closed = false;
  };
  std::vector<LaneState> lane_states() const;
  std::string snapshot_of(const std::string& base_dir) const;  // empty: none

  // Recovery, before start().
  void restore_lane(const LaneState& state);
  void restore_snapshot(const std::string& base_dir, const SnapshotCut& cut);
  void restore_micro_batch(const std::string& base_dir, const worker_protocol::MicroBatch& micro_batch);

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace ht::dispatch
