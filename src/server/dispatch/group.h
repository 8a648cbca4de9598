#pragma once

// One worker group: its process from start to restart, what is sent to it, and the way back after a crash.

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>

#include <chrono>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "server/dispatch/dispatch.h"
#include "server/dispatch/lane.h"
#include "server/store/file_work.h"
#include "server/workers/worker_group.h"

namespace ht::dispatch {

// Its message; empty: it is none.
std::string failure_of(const worker_protocol::Reply& reply);
// group_blame.cpp
std::int64_t oom_kills();

class Group {
 public:
  Group(boost::asio::io_context& io, store::FileWork& file_work, const Options& options, GroupOptions group,
        const Dispatch::Events& events);
  ~Group();

  const GroupOptions& options() const { return group_; }
  GroupStatus status() const;
  void start();
  void stop();
  void set_token_table(const std::string& path);
  boost::asio::awaitable<void> refresh_counters(std::chrono::milliseconds limit);

  Lane* find_lane(const std::string& model);
  Lane& lane(const std::string& model);
  const std::map<std::string, Lane>& lanes() const { return lanes_; }
  void submit(const Item& item);
  void consume(Lane& lane, std::int64_t seq);
  void completed(RequestId number, Effect effect);
  bool owns(RequestId number) const { return index_.contains(number) || samples_.contains(number); }
  void cancel_sample(RequestId number);
  std::vector<RequestId> close_lane(Lane& lane);
  void drop_version(const std::string& version);
  bool needed(RequestId number) const;
  void count(LaneCounts& counts) const;
  std::size_t queued_samples() const { return waiting_.size(); }

  const std::string& snapshot_dir() const { return snapshot_dir_; }
  void restore_snapshot(const SnapshotCut& cut);
  void restore_micro_batch(const worker_protocol::MicroBatch& micro_batch);
  void restore_version(Lane& lane, const std::string& version);
  // No worker runs: what need not run again is let go.
  void settle();

 private:
  // Why a worker is gone. A kill: SIGKILL or SIGTERM, by nobody knows whom.
  enum class Death { fault, kill, ours };
  // Find out which request ends the worker: one at a time, after everything whose outcome is known. `exact`: with what
  // is not finished but shares a micro-batch with that. `alone`: without, at the price of other compositions.
  enum class Care { none, exact, alone };
  struct SampleEntry {
    Item item;
    bool sent = false;
    bool cancelled = false;
    Suspicion suspicion;
  };
  struct Place {
    Lane* lane = nullptr;
    std::int64_t seq = 0;
  };
  struct Version {
    bool made = false;     // the running worker has it, or its files are complete
    bool on_disk = false;  // its files are complete
    bool failed = false;
  };
  struct Executed {
    double compute_seconds = 0;
    std::size_t bytes = 0;
    std::size_t requests = 0;
  };
  struct PendingCut {
    SnapshotCut cut;
    Executed inside;
    bool answered = false;  // by the worker
    bool syncing = false;   // all it stands in for is done
  };

  // group.cpp: sending and replies
  void pump();
  void pump_lane(Lane& lane);
  void pump_samples();
  void drop_versions();
  bool send(RequestId number, const Item& item);
  void cannot_send(Lane& lane, const Item& item);
  void on_reply(worker_protocol::Reply reply);
  void on_control(const worker_protocol::Reply& reply);
  void on_micro_batch(const worker_protocol::MicroBatch& micro_batch);
  void on_training(Place place, worker_protocol::Reply& reply);
  void on_sample(RequestId number, worker_protocol::Reply& reply);
  void settle_version(const Item& item, bool made);
  Entry* entry_of(RequestId number);
  void forget(Lane& lane, std::int64_t seq);
  RequestId send_control(worker_protocol::RequestBody body);
  bool refuse_lost(Lane& lane, const Entry& entry);
  void on_replayed(Lane& lane, const Item& item, const worker_protocol::Failure* failure);

  // group_recovery.cpp: start, crash, restart
  void launch();
  void on_loaded(const worker_protocol::Reply& reply);
  void begin();
  bool choose_replay();
  bool replay_names(RequestId number) const;
  void on_other_composition(const worker_protocol::MicroBatch& micro_batch);
  void on_exit(const std::string& reason, Death death);
  void rewind();
  void mark_mixed(const worker_protocol::MicroBatch& micro_batch);
  void abandon_worker(const std::string& reason);

  // group_blame.cpp
  Death death_of(const std::string& reason) const;
  void blame(const std::string& reason, Death death);
  void pump_carefully();
  bool send_alone(Lane& lane);
  bool send_alone(RequestId sample);

  // group_snapshots.cpp
  std::filesystem::path absolute(const std::string& cut_dir) const;
  std::string snapshot_root() const;
  void remove_unused_snapshots();
  void maybe_snapshot();
  void on_snapshot(const worker_protocol::Reply& reply);
  void try_adopt();
  void adopt();
  void remove_behind(const std::string& cut_dir);
  void discard_cut();
  void postpone_snapshot();
  void snapshot_after(std::chrono::milliseconds pause);
  void drop_covered(const SnapshotCut& cut);
  void prune_micro_batches();

  boost::asio::io_context& io_;
  store::FileWork& file_work_;
  const Options& options_;
  GroupOptions group_;
  const Dispatch::Events& events_;

  std::unique_ptr<workers::WorkerGroup> worker_;
  // Of the running worker: late callbacks of an older one are ignored.
  std::shared_ptr<std::uint64_t> epoch_ = std::make_shared<std::uint64_t>(0);
  GroupState state_ = GroupState::stopped;
  GroupStatus status_;
  std::optional<std::string> token_table_;  // not known yet, empty: none, or its file
  boost::asio::steady_timer timer_;
  int crashes_in_a_row_ = 0;  // without a finished request between them
  Care care_ = Care::none;
  std::int64_t oom_kills_ = 0;  // of the machine, when the worker was started
  RequestId next_control_ = 1;
  RequestId initialize_ = 0, restore_ = 0, snapshot_ = 0, token_table_request_ = 0, counters_request_ = 0;
  std::vector<std::shared_ptr<boost::asio::steady_timer>> counters_waiters_;

  std::map<std::string, Lane> lanes_;
  std::unordered_map<RequestId, Place> index_;  // of the lanes' entries
  std::map<RequestId, SampleEntry> samples_;
  std::set<RequestId> waiting_;  // samples not sent
  std::size_t samples_in_flight_ = 0, samples_in_flight_bytes_ = 0;
  std::unordered_map<std::string, Version> versions_;  // that are published
  std::vector<std::string> versions_to_drop_;          // once a worker is ready

  std::string snapshot_dir_;                               // of the cut in use; empty: none
  std::deque<worker_protocol::MicroBatch> micro_batches_;  // since the cut
  std::size_t replay_cursor_ = 0;                          // those that the running worker has executed
  std::optional<PendingCut> cut_;
  std::chrono::steady_clock::time_point next_snapshot_{};
  boost::asio::steady_timer snapshot_timer_;
  std::chrono::milliseconds snapshot_pause_{0};  // after the last failure
  Executed since_cut_;                           // by the running worker
  std::uint64_t snapshots_made_ = 0;
};

}  // namespace ht::dispatch
