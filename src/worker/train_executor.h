#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engine/runtime/adapter.h"
#include "engine/training/trainer.h"
#include "scheduler/train_queue.h"
#include "worker/replies.h"
#include "worker/versions.h"
#include "worker_protocol/messages.h"

namespace ht::worker {

struct TrainOptions {
  std::int32_t micro_batch_tokens = 2048;
  std::int32_t max_seq_len = 0;
  std::string base_model;  // the name that adapter files state
};

// The training lane: its requests, the adapters that they change, and the results on their way.
class TrainExecutor {
 public:
  TrainExecutor(const engine::BaseModel& model, Versions& versions, TrainOptions options, Send send);

  void push(worker_protocol::Request request);
  bool ready();
  // One op or one micro-batch.
  void run_slice(const std::function<void()>& between_blocks);

  // A snapshot: drain, then cut. Throws Error when the files cannot be written.
  void set_draining(bool draining) { queue_.set_draining(draining); }
  bool drained() const { return queue_.drained(); }
  worker_protocol::SnapshotResult snapshot(const std::string& dir);
  void restore(const std::string& dir);

  std::size_t queued() const { return queue_.size(); }
  std::uint64_t micro_batches() const { return micro_batches_; }

 private:
  struct Batch {
    worker_protocol::ForwardBackward request;
    std::vector<std::size_t> target_offsets;  // [num_datums + 1]
    std::vector<float> logprobs;
    double loss = 0;
    double seconds = 0;
    std::int32_t datums_left = 0;
    // Of a request that takes several micro-batches: the adapter's weights with the request's own gradient, which is
    // added to the adapter's at the end. A failure on the way leaves the adapter's gradient as it was.
    std::optional<engine::Adapter> partial;
  };
  // What a queued op does when it reaches the head of its queue.
  using Op = std::function<worker_protocol::DoneBody()>;
  struct PendingOp {
    std::string adapter;
    Op run;
  };

  void push_op(worker_protocol::RequestId id, const std::string& adapter, Op run);
  void push_batch(worker_protocol::RequestId id, worker_protocol::ForwardBackward request);
  void run_op(worker_protocol::RequestId id);
  void run_micro_batch(const scheduler::TrainMicroBatch& micro_batch, const std::function<void()>& between_blocks);
  void execute(const scheduler::TrainMicroBatch& micro_batch, const std::function<void()>& between_blocks);
  engine::Adapter& accumulator(Batch& batch, const scheduler::TrainSlice& slice);
  void finish_batch(worker_protocol::RequestId id);
  void done(worker_protocol::RequestId id, const std::string& adapter, worker_protocol::DoneBody body);
  void fail(worker_protocol::RequestId id, const std::string& adapter, const std::exception& error);

  engine::Adapter& adapter(const std::string& name);
  worker_protocol::DoneBody create(const worker_protocol::CreateAdapter& request);
  worker_protocol::DoneBody step(const worker_protocol::OptimStep& request);
  worker_protocol::DoneBody save(const worker_protocol::SaveAdapter& request);
  void load(engine::Adapter& adapter, const std::string& dir, bool with_optimizer);

  const engine::BaseModel& model_;
  Versions& versions_;
  const TrainOptions options_;
  const Send send_;
  engine::Trainer trainer_;
  scheduler::TrainQueue queue_;
  std::map<worker_protocol::RequestId, Batch> batches_;
  std::map<worker_protocol::RequestId, PendingOp> ops_;
  std::map<std::string, engine::Adapter> adapters_;
  std::map<std::string, worker_protocol::RequestId> last_request_;  // of live adapters
  std::uint64_t micro_batches_ = 0;
};

// Throws Error(user) naming the first thing that is wrong with a batch.
void check_batch(const worker_protocol::TrainBatch& batch, std::int32_t vocab_size, std::int32_t max_seq_len);

}  // namespace ht::worker
