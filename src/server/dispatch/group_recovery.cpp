// Start, crash and restart of a worker group.

#include <algorithm>
#include <filesystem>
#include <utility>

#include <boost/asio/post.hpp>

#include "base/logging.h"
#include "server/dispatch/group.h"

namespace ht::dispatch {

namespace wp = worker_protocol;
using std::chrono::milliseconds;

std::string failure_of(const wp::Reply& reply) {
  const auto* failure = std::get_if<wp::Failure>(&reply.body);
  return failure == nullptr ? std::string() : failure->message;
}

GroupStatus Group::status() const {
  GroupStatus status = status_;
  status.state = state_;
  status.pid = worker_ && state_ != GroupState::waiting ? worker_->pid() : 0;
  return status;
}

void Group::start() {
  remove_unused_snapshots();
  launch();
}

void Group::stop() {
  timer_.cancel();
  ++*epoch_;
  if (worker_) worker_->stop(options_.stop_grace);
  state_ = GroupState::stopped;
  status_.text = "the server is stopping";
}

void Group::set_token_table(const std::string& path) {
  token_table_ = path;
  if (state_ == GroupState::ready) token_table_request_ = send_control(wp::SetTokenTable{path});
}

void Group::launch() {
  const std::uint64_t epoch = ++*epoch_;
  state_ = GroupState::loading;
  status_.progress = 0;
  status_.text = "the base model " + group_.name + " is being loaded";
  const auto mine = [current = epoch_, epoch] { return *current == epoch; };
  workers::WorkerGroup::Callbacks callbacks;
  callbacks.on_reply = [this, mine](wp::Reply reply) {
    if (!mine()) return;
    const RequestId id = reply.id;
    try {
      on_reply(std::move(reply));
    } catch (const std::exception& error) {
      spdlog::error("{}: the reply to request {} could not be used: {}", group_.name, id, error.what());
    }
  };
  callbacks.on_exit = [this, mine](std::string reason) {
    if (mine()) on_exit(reason);
  };
  try {
    worker_ = std::make_unique<workers::WorkerGroup>(
        io_, workers::WorkerOptions{group_.worker_program, group_.name, group_.worker_log}, std::move(callbacks));
    worker_->start();
  } catch (const std::exception& error) {
    return on_exit(std::string("it could not be started: ") + error.what());
  }
  initialize_ = send_control(group_.initialize);
}

void Group::on_control(const wp::Reply& reply) {
  if (const auto* progress = std::get_if<wp::Progress>(&reply.body)) {
    if (reply.id != initialize_) return;
    status_.progress = progress->fraction;
    if (!progress->text.empty()) status_.text = progress->text;
  } else if (reply.id == initialize_) {
    on_loaded(reply);
  } else if (reply.id == restore_) {
    if (const std::string failure = failure_of(reply); !failure.empty()) {
      return abandon_worker("the snapshot " + snapshot_dir_ + " could not be restored: " + failure);
    }
    begin();
  } else if (reply.id == snapshot_) {
    on_snapshot(reply);
  } else if (reply.id == token_table_request_ && !failure_of(reply).empty()) {
    spdlog::error("{}: the token table was refused: {}", group_.name, failure_of(reply));
  }
}

void Group::on_loaded(const wp::Reply& reply) {
  const auto* done = std::get_if<wp::Done>(&reply.body);
  if (done == nullptr) return abandon_worker("the base model could not be loaded: " + failure_of(reply));
  if (const auto* info = std::get_if<wp::WorkerInfo>(&done->body)) status_.info = *info;
  status_.progress = 1;
  if (token_table_) token_table_request_ = send_control(wp::SetTokenTable{*token_table_});
  if (snapshot_dir_.empty()) return begin();
  state_ = GroupState::restoring;
  status_.text = "the adapters of " + group_.name + " are being restored";
  restore_ = send_control(wp::Restore{absolute(snapshot_dir_).string()});
}

// The adapters are those of the snapshot: from here on the lanes bring the rest.
void Group::begin() {
  const auto replay = micro_batches_to_replay();
  micro_batches_.assign(replay.begin(), replay.end());
  replay_cursor_ = 0;
  if (!replay.empty()) send_control(wp::Replay{replay});
  state_ = GroupState::ready;
  status_.text.clear();
  spdlog::info("{}: the worker is ready", group_.name);
  pump();
}

// Only slices of requests that will be sent again. In careful mode those whose outcome is known, lest the worker waits
// for a request that is held back; the others are then composed anew.
std::vector<wp::MicroBatch> Group::micro_batches_to_replay() const {
  std::vector<wp::MicroBatch> kept;
  for (const wp::MicroBatch& micro_batch : micro_batches_) {
    wp::MicroBatch filtered{micro_batch.number, {}};
    for (const wp::MicroBatchSlice& slice : micro_batch.slices) {
      const auto found = index_.find(slice.request);
      if (found == index_.end()) continue;
      const Entry& entry = found->second.lane->entries().at(found->second.seq);
      if (!careful_ || entry.item.completed) filtered.slices.push_back(slice);
    }
    if (!filtered.slices.empty()) kept.push_back(std::move(filtered));
  }
  return kept;
}

// A worker that answers but cannot do its work.
void Group::abandon_worker(const std::string& reason) {
  ++*epoch_;
  worker_->stop(milliseconds(0));
  on_exit(reason);
}

void Group::on_exit(const std::string& reason) {
  ++*epoch_;
  // Not inside its own callback.
  if (worker_) boost::asio::post(io_, [worker = std::shared_ptr<workers::WorkerGroup>(std::move(worker_))] {});
  ++crashes_in_a_row_;
  ++status_.restarts;
  status_.last_error = reason;
  const bool was_ready = state_ == GroupState::ready;
  state_ = GroupState::waiting;
  status_.text = "the worker of " + group_.name + " ended (" + reason + ") and is being started again";
  discard_cut(milliseconds(0));
  if (was_ready) blame(reason);
  rewind();
  milliseconds wait = options_.backoff_first;
  for (int i = 1; i < crashes_in_a_row_ && wait < options_.backoff_max; ++i) wait *= 2;
  wait = std::min(wait, options_.backoff_max);
  spdlog::error("{}: the worker ended: {}; next start in {} ms", group_.name, reason, wait.count());
  timer_.expires_after(wait);
  timer_.async_wait([this, current = epoch_, epoch = *epoch_](const boost::system::error_code& error) {
    if (!error && *current == epoch) launch();
  });
}

// Whatever the worker was busy with may have killed it: the first unfinished request of each lane and every running
// sample. In careful mode there is only one.
void Group::blame(const std::string& reason) {
  std::vector<RequestId> guilty;
  bool repeated = false;
  const auto count = [&](RequestId number, int& crashes) {
    ++crashes;
    if (crashes >= options_.max_crashes - 1) repeated = true;
    if (careful_ && crashes >= options_.max_crashes) guilty.push_back(number);
  };
  for (auto& [model, lane] : lanes_) {
    Entry* head = lane.head();
    if (head != nullptr && !head->item.completed) count(head->item.number, head->crashes);
  }
  for (auto& [number, sample] : samples_) {
    if (sample.sent && !sample.cancelled) count(number, sample.crashes);
  }
  if (repeated && !careful_)
    spdlog::warn("{}: looking for the request that ends the worker, one at a time", group_.name);
  careful_ = careful_ || repeated;
  for (const RequestId number : guilty) {
    const Entry* entry = entry_of(number);
    const Item item = entry != nullptr ? entry->item : samples_.at(number).item;
    if (entry != nullptr) {
      forget(*index_.at(number).lane, item.seq);
      if (item.kind == Kind::publish) settle_version(item, false);
    } else {
      samples_.erase(number);
    }
    events_.failed(number, wp::Failure{ErrorCategory::server, "the worker ended each time that it ran this request (" +
                                                                  std::to_string(options_.max_crashes) +
                                                                  " times, the last time: " + reason + ")"},
                   false);
  }
}

void Group::rewind() {
  for (auto& [model, lane] : lanes_) {
    lane.rewind();
    for (const auto& [seq, entry] : lane.entries()) {
      if (entry.item.kind != Kind::publish) continue;
      Version& version = versions_[entry.item.version];
      version.made = version.on_disk;
    }
  }
  settle();
  for (auto it = samples_.begin(); it != samples_.end();) {
    it->second.sent = false;
    if (it->second.cancelled) {
      it = samples_.erase(it);
    } else {
      waiting_.insert(it++->first);
    }
  }
  samples_in_flight_ = samples_in_flight_bytes_ = 0;
  compute_seconds_ = 0;
  executed_bytes_ = 0;
}

void Group::pump_carefully() {
  bool busy = samples_in_flight_ > 0;
  std::vector<Lane*> heads;
  for (auto& [model, lane] : lanes_) {
    while (Entry* entry = lane.next_to_send()) {
      if (!entry->item.completed) {
        heads.push_back(&lane);
        break;
      }
      lane.mark_sent(*entry);
      const Item item = entry->item;
      if (!send(item.number, item)) forget(lane, item.seq);
    }
    busy = busy || lane.in_flight > 0;
  }
  if (busy) return;
  // Everything that was known is in place. The most suspicious request runs alone.
  Lane* worst_lane = nullptr;
  RequestId worst_sample = 0;
  int crashes = -1;
  for (Lane* lane : heads) {
    if (const int of_head = lane->next_to_send()->crashes; of_head > crashes) {
      worst_lane = lane;
      crashes = of_head;
    }
  }
  for (const RequestId number : waiting_) {
    const SampleEntry& sample = samples_.at(number);
    const auto version = versions_.find(sample.item.version);
    if (version != versions_.end() && !version->second.made) continue;
    if (sample.crashes > crashes) {
      worst_sample = number;
      crashes = sample.crashes;
    }
  }
  if (crashes < 1) {
    careful_ = false;
    return pump();
  }
  if (worst_sample != 0) {
    SampleEntry& sample = samples_.at(worst_sample);
    waiting_.erase(worst_sample);
    sample.sent = true;
    ++samples_in_flight_;
    samples_in_flight_bytes_ += sample.item.bytes;
    const Item item = sample.item;
    if (send(worst_sample, item)) return;
    --samples_in_flight_;
    samples_in_flight_bytes_ -= item.bytes;
    samples_.erase(worst_sample);
  } else {
    Entry& entry = *worst_lane->next_to_send();
    worst_lane->mark_sent(entry);
    const Item item = entry.item;
    if (send(item.number, item)) return;
    forget(*worst_lane, item.seq);
  }
  pump_carefully();
}

void Group::mark_mixed(const wp::MicroBatch& micro_batch) {
  const bool changes = std::any_of(micro_batch.slices.begin(), micro_batch.slices.end(), [&](const auto& slice) {
    const Entry* entry = entry_of(slice.request);
    return entry != nullptr && entry->item.kind == Kind::train;
  });
  if (!changes) return;
  for (const auto& slice : micro_batch.slices) {
    if (Entry* entry = entry_of(slice.request)) entry->mixed = true;
  }
}

void Group::restore_micro_batch(const wp::MicroBatch& micro_batch) {
  micro_batches_.push_back(micro_batch);
  mark_mixed(micro_batch);
}

void Group::restore_version(Lane& lane, const std::string& version) {
  lane.versions.insert(version);
  versions_.try_emplace(version, Version{true, true, false});
}

void Group::settle() {
  for (auto& [model, lane] : lanes_) {
    std::vector<std::int64_t> over;
    for (const auto& [seq, entry] : lane.entries()) {
      if (entry.dead()) over.push_back(seq);
    }
    for (const std::int64_t seq : over) forget(lane, seq);
  }
  replay_cursor_ = 0;
  prune_micro_batches();
}

}  // namespace ht::dispatch
