#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include "engine/runtime/base_model.h"
#include "scheduler/turns.h"
#include "worker/file_thread.h"
#include "worker/lanes.h"
#include "worker/mailbox.h"
#include "worker/sample_executor.h"
#include "worker/train_executor.h"
#include "worker/versions.h"

namespace ht::worker {

// The worker process: three lanes whose threads fill the mailbox, the thread that reads and writes adapter files, and
// the compute thread that empties the mailbox between slices. The process ends without waiting for files: no answer
// that went out needs one that is not complete, and each gets its name when it is. Cancel, Status and Shutdown are
// answered by the control lane's thread, whatever the compute thread does.
class Worker {
 public:
  Worker(int control_fd, int training_fd, int sampling_fd);

  // The compute thread. The process ends when the control stream closes or Shutdown comes.
  [[noreturn]] void run();

 private:
  struct Counters {
    std::atomic<std::int32_t> queued_training{0}, running{0}, waiting{0};
    std::atomic<std::int64_t> blocks_total{0}, blocks_free{0};
    std::atomic<std::uint64_t> micro_batches{0}, steps{0}, trained_tokens{0}, sampled_tokens{0}, preemptions{0};
    std::atomic<std::uint64_t> adapter_bytes{0}, adapter_bytes_limit{0}, version_bytes{0};
  };

  void on_control(worker_protocol::Request request);
  worker_protocol::StatusResult status() const;

  void receive(bool wait);
  void receive_samples(Mailbox::Mail mail);
  void handle_control(worker_protocol::Request request);
  void set_token_table(const std::string& path);
  worker_protocol::WorkerInfo initialize(worker_protocol::RequestId id, const worker_protocol::Initialize& request);
  void snapshot_if_drained();
  void train_slice();
  double sample_slice();
  void between_blocks();
  void publish_counters();

  Mailbox mailbox_;
  Counters counters_;
  // Of the compute thread.
  std::unique_ptr<engine::BaseModel> model_;
  std::unique_ptr<Versions> versions_;
  std::unique_ptr<TrainExecutor> trainer_;
  std::unique_ptr<SampleExecutor> sampler_;
  std::optional<std::shared_ptr<const TokenTable>> token_table_;  // not told yet, none, or the table
  std::optional<scheduler::Turns> turns_;
  Mailbox::Mail early_;  // training and sampling requests that came before the model was loaded
  std::deque<worker_protocol::RequestId> early_cancels_;
  std::deque<worker_protocol::Request> snapshots_;  // waiting for the queue to drain
  std::chrono::steady_clock::time_point last_inside_;
  double inside_seconds_ = 0;  // of sampling inside the running micro-batch
  // Last: their threads use everything above.
  FileThread files_;
  Lane training_;
  Lane sampling_;
  Lane control_;
};

}  // namespace ht::worker
