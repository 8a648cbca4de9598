// Start, crash and restart of a worker group.

#include <algorithm>
#include <filesystem>
#include <utility>

#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>

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
  snapshot_timer_.cancel();
  ++*epoch_;
  if (worker_) worker_->stop(options_.stop_grace);
  state_ = GroupState::stopped;
  status_.text = "the server is stopping";
}

void Group::set_token_table(const std::string& path) {
  token_table_ = path;
  if (state_ == GroupState::ready) token_table_request_ = send_control(wp::SetTokenTable{path});
}

boost::asio::awaitable<void> Group::refresh_counters(milliseconds limit) {
  if (state_ != GroupState::ready) co_return;
  if (counters_request_ == 0) counters_request_ = send_control(wp::Status{});
  const auto timer = std::make_shared<boost::asio::steady_timer>(io_, limit);
  counters_waiters_.push_back(timer);
  boost::system::error_code answered;
  co_await timer->async_wait(boost::asio::redirect_error(boost::asio::use_awaitable, answered));
  std::erase(counters_waiters_, timer);
}

void Group::launch() {
  const std::uint64_t epoch = ++*epoch_;
  state_ = GroupState::loading;
  oom_kills_ = oom_kills();
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
    if (mine()) on_exit(reason, death_of(reason));
  };
  try {
    worker_ = std::make_unique<workers::WorkerGroup>(
        io_, workers::WorkerOptions{group_.worker_program, group_.name, group_.worker_log, group_.worker_arguments},
        std::move(callbacks));
    worker_->start();
  } catch (const std::exception& error) {
    return on_exit(std::string("it could not be started: ") + error.what(), Death::ours);
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
  } else if (reply.id == counters_request_) {
    counters_request_ = 0;
    const auto* done = std::get_if<wp::Done>(&reply.body);
    const auto* counters = done == nullptr ? nullptr : std::get_if<wp::StatusResult>(&done->body);
    if (counters != nullptr) status_.counters = *counters;
    for (const auto& waiter : counters_waiters_) waiter->cancel();
  } else if (reply.id == token_table_request_ && !failure_of(reply).empty()) {
    spdlog::error("{}: the token table was refused: {}", group_.name, failure_of(reply));
  }
}

void Group::on_loaded(const wp::Reply& reply) {
  const auto* done = std::get_if<wp::Done>(&reply.body);
  if (done == nullptr) {
    const auto* failure = std::get_if<wp::Failure>(&reply.body);
    status_.refused = !status_.info && failure != nullptr && failure->category == ErrorCategory::user;
    return abandon_worker("the base model could not be loaded: " + failure_of(reply));
  }
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
  if (choose_replay()) events_.compositions(group_.base_dir, {micro_batches_.begin(), micro_batches_.end()});
  replay_cursor_ = 0;
  if (!micro_batches_.empty()) send_control(wp::Replay{{micro_batches_.begin(), micro_batches_.end()}});
  state_ = GroupState::ready;
  status_.text.clear();
  drop_versions();
  spdlog::info("{}: the worker is ready", group_.name);
  pump();
}

// Leaves the micro-batches that the worker has to compose again: slices of requests that will be sent. In careful mode
// those that were not finished are held back, and the worker must not wait for them: what comes behind the last
// micro-batch with a finished request is composed anew, and Care::alone takes them out of the others too. True:
// something was taken out that the journal would bring back.
bool Group::choose_replay() {
  const auto entry_of_slice = [&](const wp::MicroBatchSlice& slice) { return entry_of(slice.request); };
  const auto has_finished = [&](const wp::MicroBatch& micro_batch) {
    return std::any_of(micro_batch.slices.begin(), micro_batch.slices.end(), [&](const auto& slice) {
      const Entry* entry = entry_of_slice(slice);
      return entry != nullptr && entry->item.completed;
    });
  };
  bool changed = false;
  if (care_ != Care::none) {
    while (!micro_batches_.empty() && !has_finished(micro_batches_.back())) {
      micro_batches_.pop_back();
      changed = true;
    }
  }
  for (wp::MicroBatch& micro_batch : micro_batches_) {
    std::erase_if(micro_batch.slices, [&](const wp::MicroBatchSlice& slice) {
      const Entry* entry = entry_of_slice(slice);
      if (entry == nullptr || entry->unreadable) return true;
      const bool held_back = care_ == Care::alone && !entry->item.completed;
      changed = changed || held_back;
      return held_back;
    });
  }
  std::erase_if(micro_batches_, [](const wp::MicroBatch& micro_batch) { return micro_batch.slices.empty(); });
  return changed;
}

bool Group::replay_names(RequestId number) const {
  return std::any_of(micro_batches_.begin() + static_cast<std::ptrdiff_t>(replay_cursor_), micro_batches_.end(),
                     [number](const wp::MicroBatch& micro_batch) {
                       return std::any_of(micro_batch.slices.begin(), micro_batch.slices.end(),
                                          [number](const auto& slice) { return slice.request == number; });
                     });
}

// The worker departs from the replay: requests of one micro-batch run one by one, as together they failed; or the
// replay did not fit, and all that is left of it is composed anew. No datum may stay in two micro-batches.
void Group::on_other_composition(const wp::MicroBatch& micro_batch) {
  spdlog::error("{}: the worker composed micro-batch {} of the replay in another way", group_.name, replay_cursor_);
  auto& expected = micro_batches_[replay_cursor_].slices;
  const bool part = std::all_of(micro_batch.slices.begin(), micro_batch.slices.end(), [&](const auto& slice) {
    return std::find(expected.begin(), expected.end(), slice) != expected.end();
  });
  if (part) {
    std::erase_if(expected, [&](const auto& slice) {
      return std::find(micro_batch.slices.begin(), micro_batch.slices.end(), slice) != micro_batch.slices.end();
    });
    if (expected.empty()) {
      micro_batches_[replay_cursor_] = micro_batch;
    } else {
      micro_batches_.insert(micro_batches_.begin() + static_cast<std::ptrdiff_t>(replay_cursor_), micro_batch);
    }
  } else {
    micro_batches_.resize(replay_cursor_);
    micro_batches_.push_back(micro_batch);
  }
  ++replay_cursor_;
  mark_mixed(micro_batch);
  events_.compositions(group_.base_dir, {micro_batches_.begin(), micro_batches_.end()});
}

// A worker that answers but cannot do its work.
void Group::abandon_worker(const std::string& reason) {
  ++*epoch_;
  worker_->stop(milliseconds(0));
  on_exit(reason, Death::ours);
}

void Group::on_exit(const std::string& reason, Death death) {
  ++*epoch_;
  // Not inside its own callback.
  if (worker_) boost::asio::post(io_, [worker = std::shared_ptr<workers::WorkerGroup>(std::move(worker_))] {});
  ++crashes_in_a_row_;
  counters_request_ = 0;
  status_.counters.reset();
  ++status_.restarts;
  status_.last_error = reason;
  const bool was_ready = state_ == GroupState::ready;
  state_ = GroupState::waiting;
  status_.text = "the worker of " + group_.name + " ended (" + reason + ") and is being started again";
  discard_cut();
  if (was_ready && death != Death::ours) blame(reason, death);
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
  since_cut_ = {};
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
