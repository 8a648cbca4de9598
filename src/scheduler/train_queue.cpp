#include "scheduler/train_queue.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.h"

namespace ht::scheduler {

namespace {

// Ops an adapter may run on average between two micro-batches that are ready: a client that sends ops alone must not
// keep the others from training.
constexpr std::size_t kOpsPerAdapterInARow = 4;

// Micro-batches for which draining first holds long requests back, and for which it does at most.
constexpr std::int64_t kFirstHold = 8;
constexpr std::int64_t kLongestHold = std::int64_t{1} << 20;

std::int64_t tokens_of(const TrainRequest& request, std::int32_t begin, std::int32_t end) {
  return std::accumulate(request.datum_tokens.begin() + begin, request.datum_tokens.begin() + end, std::int64_t{0});
}

}  // namespace

struct TrainQueue::Composition {
  bool forward_only = false;
  std::int64_t tokens = 0;
  std::map<std::string, std::vector<TrainSlice>> slices;
  // Requests of an adapter that this composition has used up: index of the request it takes from.
  std::map<std::string, std::size_t> position;
};

void TrainQueue::push(TrainRequest request) {
  adapter_of_[request.id] = request.adapter;
  Fifo& fifo = fifos_[request.adapter];
  fifo.push_back(Pending{std::move(request), 0});
  ++num_requests_;
}

void TrainQueue::set_live(const std::string& adapter, bool live) {
  if (live) {
    live_.insert(adapter);
  } else {
    live_.erase(adapter);
  }
}

void TrainQueue::set_replay(std::vector<TrainMicroBatch> micro_batches) {
  for (TrainMicroBatch& micro_batch : micro_batches) {
    next_number_ = std::max(next_number_, micro_batch.number + 1);
    replay_.push_back(std::move(micro_batch));
  }
}

void TrainQueue::clear_replay() {
  replay_.clear();
}

void TrainQueue::remove(RequestId id) {
  for (TrainMicroBatch& micro_batch : replay_) {
    std::erase_if(micro_batch.slices, [id](const TrainSlice& slice) { return slice.request == id; });
  }
  std::erase_if(replay_, [](const TrainMicroBatch& micro_batch) { return micro_batch.slices.empty(); });
  const auto found = adapter_of_.find(id);
  if (found == adapter_of_.end()) return;
  const auto fifo = fifos_.find(found->second);
  num_requests_ -= std::erase_if(fifo->second, [id](const Pending& pending) { return pending.request.id == id; });
  if (fifo->second.empty()) fifos_.erase(fifo);
  adapter_of_.erase(found);
}

void TrainQueue::set_draining(bool draining) {
  if (draining && !draining_) phase_length_ = phase_left_ = kFirstHold;
  if (draining != draining_) holding_back_ = draining;
  draining_ = draining;
}

// After a micro-batch.
void TrainQueue::count_draining() {
  if (!draining_ || --phase_left_ > 0) return;
  holding_back_ = !holding_back_;
  if (holding_back_) phase_length_ = std::min(2 * phase_length_, kLongestHold);
  phase_left_ = phase_length_;
}

bool TrainQueue::may_begin(const TrainRequest& request) const {
  const auto num_datums = static_cast<std::int32_t>(request.datum_tokens.size());
  return !holding_back_ || num_datums == 1 || tokens_of(request, 0, num_datums) <= micro_batch_tokens_;
}

bool TrainQueue::drained() const {
  return replay_.empty() &&
         std::none_of(fifos_.begin(), fifos_.end(), [](const auto& entry) { return entry.second.front().started(); });
}

// An op, or a batch to refuse.
bool TrainQueue::has_runnable_op(const std::string& adapter, const Fifo& fifo) const {
  return !held_.contains(adapter) && (!fifo.front().request.is_batch || !live_.contains(adapter));
}

bool TrainQueue::has_runnable_batch(const std::string& adapter, const Fifo& fifo) const {
  const Pending& head = fifo.front();
  return replay_.empty() && head.request.is_batch && can_train(adapter) && (head.started() || may_begin(head.request));
}

// Whether every slice of the next replayed micro-batch is next in its adapter's queue.
bool TrainQueue::replay_ready() const {
  if (replay_.empty()) return false;
  std::map<std::string, std::pair<std::size_t, std::int32_t>> reached;  // adapter → (index in fifo, next datum)
  for (const TrainSlice& slice : replay_.front().slices) {
    const auto adapter = adapter_of_.find(slice.request);
    if (adapter == adapter_of_.end() || !can_train(adapter->second)) return false;
    const Fifo& fifo = fifos_.at(adapter->second);
    auto [position, is_new] = reached.try_emplace(adapter->second, 0, fifo.front().next_datum);
    auto& [index, next_datum] = position->second;
    if (index < fifo.size() && next_datum == fifo[index].num_datums() && fifo[index].request.is_batch) {
      ++index;
      next_datum = 0;
    }
    if (index >= fifo.size() || fifo[index].request.id != slice.request) return false;
    if (slice.datum_begin != next_datum || slice.datum_end <= next_datum ||
        slice.datum_end > fifo[index].num_datums()) {
      throw server_error("the replay wants datums " + std::to_string(slice.datum_begin) + " to " +
                         std::to_string(slice.datum_end) + " of request " + std::to_string(slice.request) +
                         ", which has " + std::to_string(fifo[index].num_datums()) + " and has come to datum " +
                         std::to_string(next_datum));
    }
    next_datum = slice.datum_end;
  }
  return true;
}

bool TrainQueue::ready() const {
  return replay_ready() || std::any_of(fifos_.begin(), fifos_.end(), [this](const auto& entry) {
           return has_runnable_op(entry.first, entry.second) || has_runnable_batch(entry.first, entry.second);
         });
}

TrainPlan TrainQueue::next() {
  const bool batch_ready = replay_ready() || std::any_of(fifos_.begin(), fifos_.end(), [this](const auto& entry) {
                             return has_runnable_batch(entry.first, entry.second);
                           });
  // Ops first: they are short, and behind them lie the batches that can be merged.
  if (!batch_ready || ops_in_a_row_ < kOpsPerAdapterInARow * fifos_.size()) {
    TrainPlan plan = next_op();
    if (plan.kind != TrainPlan::Kind::none) {
      ++ops_in_a_row_;
      return plan;
    }
  }
  if (!batch_ready) return {};
  ops_in_a_row_ = 0;
  TrainPlan plan;
  plan.kind = TrainPlan::Kind::micro_batch;
  plan.micro_batch = replay_.empty() ? compose() : take_replayed();
  return plan;
}

TrainPlan TrainQueue::next_op() {
  auto it = fifos_.upper_bound(op_cursor_);
  for (std::size_t visited = 0; visited < fifos_.size(); ++visited, ++it) {
    if (it == fifos_.end()) it = fifos_.begin();
    if (!has_runnable_op(it->first, it->second)) continue;
    const Pending& head = it->second.front();
    TrainPlan plan;
    plan.kind = head.request.is_batch ? TrainPlan::Kind::refused : TrainPlan::Kind::op;
    plan.request = head.request.id;
    op_cursor_ = it->first;
    remove(plan.request);
    return plan;
  }
  return {};
}

// Takes the adapter's next datum if it may run now and fits. While long requests are held back, a request that begins
// is taken whole.
bool TrainQueue::take_datum(const std::string& adapter, Composition& composition) {
  const Fifo& fifo = fifos_.at(adapter);
  std::size_t& index = composition.position[adapter];
  std::vector<TrainSlice>& slices = composition.slices[adapter];
  const auto next_datum_of = [&](std::size_t i) {
    return !slices.empty() && slices.back().request == fifo[i].request.id ? slices.back().datum_end
                                                                          : fifo[i].next_datum;
  };
  if (next_datum_of(index) == fifo[index].num_datums()) {
    if (index + 1 == fifo.size()) return false;
    ++index;
  }
  const Pending& pending = fifo[index];
  if (!pending.request.is_batch || pending.request.forward_only != composition.forward_only) return false;
  const std::int32_t datum = next_datum_of(index);
  const bool whole = holding_back_ && !pending.started();
  if (whole && !may_begin(pending.request)) return false;
  const std::int32_t end = whole ? pending.num_datums() : datum + 1;
  const std::int64_t tokens = tokens_of(pending.request, datum, end);
  if (composition.tokens > 0 && composition.tokens + tokens > micro_batch_tokens_) return false;
  composition.tokens += std::max<std::int64_t>(tokens, 1);
  if (!slices.empty() && slices.back().request == pending.request.id) {
    slices.back().datum_end = end;
  } else {
    slices.push_back({pending.request.id, datum, end});
  }
  return true;
}

// Adapters take turns, a datum each, until nothing fits. The first one that came away with nothing begins the next
// micro-batch, so that none waits longer than one round of the others.
TrainMicroBatch TrainQueue::compose() {
  std::vector<std::string> adapters;
  auto it = fifos_.lower_bound(batch_cursor_);
  for (std::size_t visited = 0; visited < fifos_.size(); ++visited, ++it) {
    if (it == fifos_.end()) it = fifos_.begin();
    if (has_runnable_batch(it->first, it->second)) adapters.push_back(it->first);
  }
  Composition composition;
  composition.forward_only = fifos_.at(adapters.front()).front().request.forward_only;
  std::vector<std::string> taking = adapters;
  while (!taking.empty()) {
    std::erase_if(taking, [&](const std::string& adapter) { return !take_datum(adapter, composition); });
  }

  TrainMicroBatch micro_batch;
  micro_batch.number = next_number_++;
  micro_batch.forward_only = composition.forward_only;
  const auto denied = std::find_if(adapters.begin(), adapters.end(),
                                   [&](const std::string& adapter) { return composition.slices[adapter].empty(); });
  batch_cursor_ = denied != adapters.end() ? *denied : adapters[adapters.size() > 1 ? 1 : 0];
  for (const std::string& adapter : adapters) {
    for (const TrainSlice& slice : composition.slices[adapter]) {
      micro_batch.slices.push_back(slice);
      const auto pending = std::find_if(fifos_[adapter].begin(), fifos_[adapter].end(),
                                        [&](const Pending& p) { return p.request.id == slice.request; });
      pending->next_datum = slice.datum_end;
    }
    pop_finished(adapter);
  }
  count_draining();
  return micro_batch;
}

TrainMicroBatch TrainQueue::take_replayed() {
  TrainMicroBatch micro_batch = std::move(replay_.front());
  replay_.pop_front();
  for (const TrainSlice& slice : micro_batch.slices) {
    const std::string adapter = adapter_of_.at(slice.request);
    Pending& head = fifos_.at(adapter).front();
    micro_batch.forward_only = head.request.forward_only;
    head.next_datum = slice.datum_end;
    pop_finished(adapter);
  }
  return micro_batch;
}

void TrainQueue::pop_finished(const std::string& adapter) {
  for (auto fifo = fifos_.find(adapter); fifo != fifos_.end() && fifo->second.front().request.is_batch &&
                                         fifo->second.front().next_datum == fifo->second.front().num_datums();
       fifo = fifos_.find(adapter)) {
    adapter_of_.erase(fifo->second.front().request.id);
    fifo->second.pop_front();
    --num_requests_;
    if (fifo->second.empty()) fifos_.erase(fifo);
  }
}

}  // namespace ht::scheduler
