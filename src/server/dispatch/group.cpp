#include "server/dispatch/group.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "base/logging.h"

namespace ht::dispatch {

namespace wp = worker_protocol;

namespace {

// Ids of control requests: no journal number is that high.
constexpr RequestId kControlBit = RequestId{1} << 63;

double compute_seconds(const wp::DoneBody& body) {
  if (const auto* train = std::get_if<wp::TrainResult>(&body)) return train->compute_seconds;
  if (const auto* step = std::get_if<wp::OptimResult>(&body)) return step->compute_seconds;
  return 0;
}

// The server makes the directories that a worker writes into; a recovery may find one moved away already.
void make_target_dir(const wp::RequestBody& body) {
  if (const auto* save = std::get_if<wp::SaveAdapter>(&body)) std::filesystem::create_directories(save->dir);
  const auto* publish = std::get_if<wp::PublishVersion>(&body);
  if (publish != nullptr && !publish->dir.empty()) std::filesystem::create_directories(publish->dir);
}

}  // namespace

Group::Group(boost::asio::io_context& io, store::FileWork& file_work, const Options& options, GroupOptions group,
             const Dispatch::Events& events)
    : io_(io),
      file_work_(file_work),
      options_(options),
      group_(std::move(group)),
      events_(events),
      timer_(io),
      snapshot_timer_(io) {}

Group::~Group() {
  ++*epoch_;
}

Lane* Group::find_lane(const std::string& model) {
  const auto found = lanes_.find(model);
  return found == lanes_.end() ? nullptr : &found->second;
}

Lane& Group::lane(const std::string& model) {
  return lanes_.try_emplace(model, model).first->second;
}

Entry* Group::entry_of(RequestId number) {
  const auto found = index_.find(number);
  if (found == index_.end()) return nullptr;
  const auto entry = found->second.lane->entries().find(found->second.seq);
  return entry == found->second.lane->entries().end() ? nullptr : &entry->second;
}

void Group::submit(const Item& item) {
  if (item.kind == Kind::sample) {
    if (item.completed) return;
    samples_[item.number] = SampleEntry{item};
    waiting_.insert(item.number);
    if (state_ == GroupState::ready) pump_samples();
    return;
  }
  Lane& of = lane(item.model);
  if (item.completed && item.effect == Effect::none) return consume(of, item.seq);
  if (item.kind == Kind::publish) {
    of.versions.insert(item.version);
    versions_[item.version] = Version{};
  }
  of.add(item);
  index_[item.number] = Place{&of, item.seq};
  if (state_ == GroupState::ready) pump_lane(of);
}

void Group::consume(Lane& lane, std::int64_t seq) {
  lane.consume(seq);
  if (state_ == GroupState::ready) pump_lane(lane);
}

void Group::forget(Lane& lane, std::int64_t seq) {
  const auto found = lane.entries().find(seq);
  if (found == lane.entries().end()) return;
  index_.erase(found->second.item.number);
  lane.erase(seq);
}

void Group::completed(RequestId number, Effect effect) {
  Entry* entry = entry_of(number);
  if (entry == nullptr) return;
  const Place place = index_.at(number);
  entry->item.completed = true;
  entry->item.effect = effect;
  // What ran stays until the next cut, which may name it as an adapter's last request; a restart lets it go.
  if (entry->dead() && !entry->executed) {
    forget(*place.lane, place.seq);
    if (state_ == GroupState::ready) pump_lane(*place.lane);
  }
  if (cut_) try_adopt();
}

void Group::cancel_sample(RequestId number) {
  const auto found = samples_.find(number);
  if (found == samples_.end()) return;
  if (found->second.sent) {
    found->second.cancelled = true;
    send_control(wp::Cancel{number});
  } else {
    waiting_.erase(number);
    samples_.erase(found);
  }
}

std::vector<RequestId> Group::close_lane(Lane& lane) {
  // What a running replay still waits for stays: other models' micro-batches are composed with it.
  std::set<RequestId> kept;
  for (std::size_t i = replay_cursor_; i < micro_batches_.size(); ++i) {
    for (const wp::MicroBatchSlice& slice : micro_batches_[i].slices) kept.insert(slice.request);
  }
  std::vector<RequestId> numbers;
  for (const Entry& entry : lane.close(kept)) {
    numbers.push_back(entry.item.number);
    index_.erase(entry.item.number);
    if (entry.item.kind == Kind::publish) settle_version(entry.item, false);
  }
  return numbers;
}

void Group::drop_version(const std::string& version) {
  versions_to_drop_.push_back(version);
  if (state_ == GroupState::ready) drop_versions();
}

void Group::drop_versions() {
  for (std::string& version : std::exchange(versions_to_drop_, {})) send_control(wp::DropVersion{std::move(version)});
}

bool Group::needed(RequestId number) const {
  return owns(number);
}

void Group::count(LaneCounts& counts) const {
  for (const auto& [model, lane] : lanes_) {
    for (const auto& [seq, entry] : lane.entries()) {
      if (entry.item.completed || entry.executed) continue;
      ++(entry.sent ? counts.running : seq < lane.horizon() || lane.closed() ? counts.queued : counts.parked);
    }
  }
  counts.queued += waiting_.size();
  counts.running += samples_.size() - waiting_.size();
}

RequestId Group::send_control(wp::RequestBody body) {
  const RequestId id = kControlBit | next_control_++;
  if (worker_) worker_->send(wp::Request{id, std::move(body)});
  return id;
}

bool Group::send(RequestId number, const Item& item) {
  try {
    wp::RequestBody body = events_.body(number);
    make_target_dir(body);
    worker_->send(wp::Request{number, std::move(body)});
    return true;
  } catch (const std::exception& error) {
    spdlog::error("{}: request {} cannot be sent: {}", group_.name, number, error.what());
    if (!item.completed) events_.failed(number, wp::Failure{ErrorCategory::server, error.what()}, Effect::none);
    return false;
  }
}

// What has no outcome was failed. Else the adapter cannot be brought back to where it was.
void Group::cannot_send(Lane& lane, const Item& item) {
  const bool awaited = replay_names(item.number);
  if (item.completed) {
    Entry& entry = lane.entries().at(item.seq);
    entry.unreadable = true;
    lane.mark_executed(entry);
    lane.lost = fmt::format(
        "the state of model {} is lost: its request {} could not be read again after a restart of "
        "the worker; load a checkpoint into it",
        lane.model(), item.seq);
    if (item.kind == Kind::publish) settle_version(item, false);
  } else {
    forget(lane, item.seq);
  }
  // The worker would wait for it.
  if (awaited) abandon_worker(fmt::format("request {} of the replay cannot be sent", item.number));
}

// Whether nothing of the entry goes to the worker, as its model's state is lost. What has an outcome does:
// micro-batches of other models are composed with it.
bool Group::refuse_lost(Lane& lane, const Entry& entry) {
  const Item item = entry.item;
  if (lane.lost.empty() || item.kind == Kind::load || item.kind == Kind::drop) return false;
  if (item.completed && item.kind != Kind::publish) return false;
  const std::string why = lane.lost;
  forget(lane, item.seq);
  if (item.kind == Kind::publish) settle_version(item, false);
  if (!item.completed) events_.failed(item.number, wp::Failure{ErrorCategory::server, why}, Effect::none);
  return true;
}

// The answer to a request whose outcome is known.
void Group::on_replayed(Lane& lane, const Item& item, const wp::Failure* failure) {
  const bool refused = failure != nullptr;
  if (!changes_state(item.kind) || refused == (item.effect == Effect::refused)) return;
  spdlog::error("{}: request {} was {} before the restart and {} in the replay", group_.name, item.number,
                refused ? "done" : "refused", refused ? "failed: " + failure->message : "done");
  if (!lane.lost.empty()) return;
  lane.lost = fmt::format(
      "the state of model {} is lost: its request {} {} after a restart of the worker; load a "
      "checkpoint into it",
      lane.model(), item.seq, refused ? "failed (" + failure->message + ")" : "was not refused any more");
}

void Group::pump() {
  if (state_ != GroupState::ready) return;
  if (care_ != Care::none) return pump_carefully();
  for (auto& [model, lane] : lanes_) pump_lane(lane);
  pump_samples();
}

void Group::pump_lane(Lane& lane) {
  if (state_ != GroupState::ready) return;
  if (care_ != Care::none) return pump_carefully();
  while (Entry* entry = lane.next_to_send()) {
    if (refuse_lost(lane, *entry)) continue;
    if (lane.in_flight > 0 && (lane.in_flight >= options_.model_in_flight ||
                               lane.in_flight_bytes + entry->item.bytes > options_.model_in_flight_bytes)) {
      return;
    }
    lane.mark_sent(*entry);
    const Item item = entry->item;
    if (!send(item.number, item)) cannot_send(lane, item);
    if (state_ != GroupState::ready) return;
  }
}

void Group::pump_samples() {
  if (state_ != GroupState::ready) return;
  if (care_ != Care::none) return pump_carefully();
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    const RequestId number = *it++;
    SampleEntry& sample = samples_.at(number);
    if (samples_in_flight_ > 0 && (samples_in_flight_ >= options_.samples_in_flight ||
                                   samples_in_flight_bytes_ + sample.item.bytes > options_.samples_in_flight_bytes)) {
      return;
    }
    const auto version = versions_.find(sample.item.version);
    if (!sample.item.version.empty() && version != versions_.end() && !version->second.made) {
      if (!version->second.failed) continue;  // its publish is not done
      waiting_.erase(number);
      const Item item = sample.item;
      samples_.erase(number);
      events_.failed(number, wp::Failure{ErrorCategory::server, "the weights " + item.version + " were not published"},
                     Effect::none);
      return pump_samples();
    }
    waiting_.erase(number);
    sample.sent = true;
    ++samples_in_flight_;
    samples_in_flight_bytes_ += sample.item.bytes;
    const Item item = sample.item;
    if (!send(number, item)) {
      --samples_in_flight_;
      samples_in_flight_bytes_ -= item.bytes;
      samples_.erase(number);
    }
    it = waiting_.upper_bound(number);
  }
}

void Group::on_reply(wp::Reply reply) {
  if (const auto* executed = std::get_if<wp::MicroBatchExecuted>(&reply.body)) {
    return on_micro_batch(executed->micro_batch);
  }
  if ((reply.id & kControlBit) != 0) return on_control(reply);
  if (std::holds_alternative<wp::Progress>(reply.body)) return;
  if (const auto found = index_.find(reply.id); found != index_.end()) {
    on_training(found->second, reply);
  } else if (samples_.contains(reply.id)) {
    on_sample(reply.id, reply);
  }
}

void Group::on_micro_batch(const wp::MicroBatch& micro_batch) {
  if (replay_cursor_ < micro_batches_.size()) {
    if (micro_batches_[replay_cursor_].slices != micro_batch.slices) return on_other_composition(micro_batch);
    ++replay_cursor_;
    return;
  }
  events_.micro_batch(group_.base_dir, micro_batch);
  micro_batches_.push_back(micro_batch);
  ++replay_cursor_;
  mark_mixed(micro_batch);
}

void Group::on_training(Place place, wp::Reply& reply) {
  Entry* entry = entry_of(reply.id);
  if (entry == nullptr || !entry->sent || entry->executed) return;
  place.lane->mark_executed(*entry);
  since_cut_.bytes += entry->item.bytes;
  ++since_cut_.requests;
  crashes_in_a_row_ = 0;
  const Item item = entry->item;
  auto* done = std::get_if<wp::Done>(&reply.body);
  if (done != nullptr) since_cut_.compute_seconds += compute_seconds(done->body);
  if (item.kind == Kind::publish) settle_version(item, done != nullptr && place.lane->lost.empty());
  if (item.kind == Kind::drop) {
    for (const std::string& version : place.lane->versions) {
      if (versions_.erase(version) > 0) send_control(wp::DropVersion{version});
    }
    place.lane->versions.clear();
  }
  Lane& lane = *place.lane;
  if (item.kind == Kind::load && done != nullptr) lane.lost.clear();
  if (item.completed) {
    on_replayed(lane, item, std::get_if<wp::Failure>(&reply.body));
  } else if (!lane.lost.empty() && item.kind != Kind::load && item.kind != Kind::drop) {
    events_.failed(reply.id, wp::Failure{ErrorCategory::server, lane.lost}, Effect::none);
  } else if (done != nullptr) {
    events_.done(reply.id, std::move(done->body));
  } else {
    events_.failed(reply.id, std::get<wp::Failure>(reply.body),
                   item.kind == Kind::step ? Effect::refused : Effect::none);
  }
  pump_lane(lane);
  maybe_snapshot();
}

void Group::settle_version(const Item& item, bool made) {
  Version& version = versions_[item.version];
  version.made = made;
  version.failed = !made;
  pump_samples();
}

void Group::on_sample(RequestId number, wp::Reply& reply) {
  const auto found = samples_.find(number);
  if (!found->second.sent) return;
  --samples_in_flight_;
  samples_in_flight_bytes_ -= found->second.item.bytes;
  crashes_in_a_row_ = 0;
  const bool cancelled = found->second.cancelled;
  samples_.erase(found);
  if (!cancelled) {
    if (auto* done = std::get_if<wp::Done>(&reply.body)) {
      events_.done(number, std::move(done->body));
    } else {
      events_.failed(number, std::get<wp::Failure>(reply.body), Effect::none);
    }
  }
  pump_samples();
}

}  // namespace ht::dispatch
