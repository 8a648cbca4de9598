#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "engine/runtime/adapter.h"
#include "engine/training/trainer.h"
#include "scheduler/train_queue.h"
#include "worker/file_thread.h"
#include "worker/replies.h"
#include "worker/versions.h"
#include "worker_protocol/messages.h"

namespace ht::worker {

struct TrainOptions {
  std::int32_t micro_batch_tokens = 2048;
  std::int32_t max_seq_len = 0;
  std::string base_model;  // the name that adapter files state
  std::uint64_t adapter_bytes =
      std::numeric_limits<std::uint64_t>::max();  // of all adapters (model_spec::adapter_bytes)
  // Of buffers that are written to files while their adapters go on. What is beyond waits for its file.
  std::uint64_t copy_bytes = std::numeric_limits<std::uint64_t>::max();
};

// The training lane: its requests, the adapters that they change, and the results on their way.
class TrainExecutor {
 public:
  TrainExecutor(const engine::BaseModel& model, Versions& versions, FileThread& files, TrainOptions options, Send send);

  void push(worker_protocol::Request request);
  bool ready();
  // One op or one micro-batch.
  void run_slice(const std::function<void()>& between_blocks);

  // A snapshot: drain, then cut. The cut is taken now and written behind; `then` hears of its result or Failure.
  using SnapshotReply = std::variant<worker_protocol::Done, worker_protocol::Failure>;
  void set_draining(bool draining) { queue_.set_draining(draining); }
  bool drained() const { return queue_.drained(); }
  void snapshot(const std::string& dir, std::function<void(SnapshotReply)> then);
  void restore(const std::string& dir);

  std::size_t queued() const { return queue_.size(); }
  std::uint64_t micro_batches() const { return micro_batches_; }
  std::uint64_t tokens() const { return tokens_; }
  std::uint64_t adapter_bytes() const { return adapter_bytes_; }

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
  // What a queued op does when it reaches the head of its queue. Nothing: it answers later, with done() or fail().
  using Op = std::function<std::optional<worker_protocol::DoneBody>()>;
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
  void drop_adapter(const std::string& name);
  std::optional<worker_protocol::DoneBody> create(worker_protocol::RequestId id,
                                                  const worker_protocol::CreateAdapter& request);
  void load(worker_protocol::RequestId id, const worker_protocol::LoadAdapter& request);
  void read_adapter(worker_protocol::RequestId id, const std::string& name, const std::string& dir, bool with_optimizer,
                    std::uint64_t reserved, std::function<engine::Adapter()> make);
  worker_protocol::DoneBody step(const worker_protocol::OptimStep& request);
  void save(worker_protocol::RequestId id, const worker_protocol::SaveAdapter& request);
  std::optional<worker_protocol::DoneBody> publish(worker_protocol::RequestId id,
                                                   const worker_protocol::PublishVersion& request, bool again);

  // Writes from the adapter as it is now, on the file thread: `write` gives the bytes, `then` gets them or the error.
  using Write = std::function<std::uint64_t(const engine::Adapter&)>;
  using Written = std::function<void(std::uint64_t bytes, const Error* error)>;
  void write_adapter(const std::string& name, Write write, Written then);

  const engine::BaseModel& model_;
  Versions& versions_;
  FileThread& files_;
  const TrainOptions options_;
  const Send send_;
  engine::Trainer trainer_;
  scheduler::TrainQueue queue_;
  std::map<worker_protocol::RequestId, Batch> batches_;
  std::map<worker_protocol::RequestId, PendingOp> ops_;
  std::map<std::string, engine::Adapter> adapters_;
  std::map<std::string, worker_protocol::RequestId> last_request_;  // of live adapters
  std::uint64_t adapter_bytes_ = 0;                                 // of adapters_ and of those being read
  std::uint64_t copy_bytes_ = 0;                                    // of buffers that files are written from
  std::uint64_t micro_batches_ = 0;
  std::uint64_t tokens_ = 0;
};

// Throws Error(user) naming the first thing that is wrong with a batch.
void check_batch(const worker_protocol::TrainBatch& batch, std::int32_t vocab_size, std::int32_t max_seq_len);

}  // namespace ht::worker
