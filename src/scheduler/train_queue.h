#pragma once

// Training work in order: one FIFO an adapter, whose heads are merged into packed micro-batches.

#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace ht::scheduler {

using RequestId = std::uint64_t;

// A request of the training lane. A batch (forward or forward_backward) has datums; everything else is an op that runs
// alone when it reaches the head of its adapter's queue.
struct TrainRequest {
  RequestId id = 0;
  std::string adapter;
  bool is_batch = false;
  bool forward_only = false;
  std::vector<std::int32_t> datum_tokens;  // [num_datums] tokens of each datum; a batch has at least one
};

// Datums [datum_begin, datum_end) of one request.
struct TrainSlice {
  RequestId request = 0;
  std::int32_t datum_begin = 0;
  std::int32_t datum_end = 0;

  friend bool operator==(const TrainSlice&, const TrainSlice&) = default;
};

// One packed batch. Slices of one adapter are adjacent and in the order of its queue.
struct TrainMicroBatch {
  std::uint64_t number = 0;
  bool forward_only = false;
  std::vector<TrainSlice> slices;
};

// What the compute thread does next. A plan counts as executed as soon as it is handed out.
struct TrainPlan {
  enum class Kind { none, op, micro_batch, refused };
  Kind kind = Kind::none;
  RequestId request = 0;  // op; refused: a batch of an adapter that does not exist
  TrainMicroBatch micro_batch;
};

class TrainQueue {
 public:
  // `micro_batch_tokens`: the most tokens of a micro-batch of several datums; one datum may be longer.
  explicit TrainQueue(std::int32_t micro_batch_tokens) : micro_batch_tokens_(micro_batch_tokens) {}

  void push(TrainRequest request);
  // Batches of adapters that are not live are refused when they reach the head.
  void set_live(const std::string& adapter, bool live);
  // Nothing of the adapter runs until hold() has been taken back as often by release(): files are read for it, or
  // written from its buffers. Not while a request of it is partly executed.
  void hold(const std::string& adapter) { held_.insert(adapter); }
  void release(const std::string& adapter) { held_.erase(held_.find(adapter)); }
  // Compose exactly these before composing freely; their requests may still have to come.
  void set_replay(std::vector<TrainMicroBatch> micro_batches);
  void clear_replay();
  // Takes a request out, with what is left of it: it failed.
  void remove(RequestId id);

  // Draining: sees to it that drained(), no request is partly executed, comes true, without making others wait for the
  // end of a long request. Ops and requests that fit into one micro-batch whole go on as ever, and so does an
  // unfinished replay. Requests of several micro-batches are not begun, but for a bounded number of micro-batches; then
  // they are, for as many, then they are not for twice as many, and so on.
  void set_draining(bool draining);
  bool drained() const;

  // Throws Error(server) when the replay does not fit the requests that came (clear_replay() composes freely again).
  TrainPlan next();
  // Whether next() would hand out a plan. Throws like next().
  bool ready() const;

  std::size_t size() const { return num_requests_; }
  std::uint64_t next_number() const { return next_number_; }
  void set_next_number(std::uint64_t number) { next_number_ = number; }

 private:
  struct Pending {
    TrainRequest request;
    std::int32_t next_datum = 0;
    bool started() const { return next_datum > 0; }
    std::int32_t num_datums() const { return static_cast<std::int32_t>(request.datum_tokens.size()); }
  };
  using Fifo = std::deque<Pending>;
  struct Composition;

  bool may_begin(const TrainRequest& request) const;
  bool can_train(const std::string& adapter) const { return live_.contains(adapter) && !held_.contains(adapter); }
  void count_draining();
  bool has_runnable_op(const std::string& adapter, const Fifo& fifo) const;
  bool has_runnable_batch(const std::string& adapter, const Fifo& fifo) const;
  bool replay_ready() const;
  TrainPlan next_op();
  TrainMicroBatch compose();
  TrainMicroBatch take_replayed();
  bool take_datum(const std::string& adapter, Composition& composition);
  void pop_finished(const std::string& adapter);

  std::int32_t micro_batch_tokens_;
  std::map<std::string, Fifo> fifos_;  // no empty ones
  std::map<RequestId, std::string> adapter_of_;
  std::set<std::string> live_;
  std::multiset<std::string> held_;
  std::deque<TrainMicroBatch> replay_;
  std::size_t num_requests_ = 0;
  std::uint64_t next_number_ = 1;
  bool draining_ = false;
  bool holding_back_ = false;      // draining, and long requests are not begun
  std::int64_t phase_length_ = 0;  // micro-batches until that changes, when it changed last
  std::int64_t phase_left_ = 0;
  std::string batch_cursor_;  // adapter that starts the next micro-batch
  std::string op_cursor_;     // adapter that ran the last op
  std::size_t ops_in_a_row_ = 0;
};

}  // namespace ht::scheduler
