#include "server/dispatch/dispatch.h"

#include <unordered_map>
#include <utility>

#include "server/dispatch/group.h"
#include "server/store/file_work.h"

namespace ht::dispatch {

namespace wp = worker_protocol;

bool changes_state(Kind kind) {
  return kind != Kind::forward && kind != Kind::save && kind != Kind::sample;
}

Item describe(Item item, const wp::RequestBody& body) {
  if (std::holds_alternative<wp::CreateAdapter>(body)) {
    item.kind = Kind::create;
  } else if (const auto* work = std::get_if<wp::ForwardBackward>(&body)) {
    item.kind = work->forward_only ? Kind::forward : Kind::train;
  } else if (std::holds_alternative<wp::OptimStep>(body)) {
    item.kind = Kind::step;
  } else if (std::holds_alternative<wp::SaveAdapter>(body)) {
    item.kind = Kind::save;
  } else if (std::holds_alternative<wp::LoadAdapter>(body)) {
    item.kind = Kind::load;
  } else if (const auto* publish = std::get_if<wp::PublishVersion>(&body)) {
    item.kind = Kind::publish;
    item.version = publish->version;
  } else if (std::holds_alternative<wp::DropAdapter>(body)) {
    item.kind = Kind::drop;
  } else if (const auto* sample = std::get_if<wp::Sample>(&body)) {
    item.kind = Kind::sample;
    item.version = sample->version;
  } else {
    throw server_error("this worker request cannot be submitted: it belongs to no model and is no sample");
  }
  return item;
}

struct Dispatch::Impl {
  explicit Impl(boost::asio::io_context& io) : file_work(io) {}

  store::FileWork file_work;  // of all groups' snapshots
  Options options;
  Events events;
  std::map<std::string, std::unique_ptr<Group>> groups;  // by base_dir

  Group& group(const std::string& base_dir) {
    const auto found = groups.find(base_dir);
    if (found == groups.end()) throw user_error("no worker serves the base model " + base_dir);
    return *found->second;
  }
  // The model's group, or nullptr.
  Group* group_of(const std::string& model) {
    for (auto& [base_dir, group] : groups) {
      if (group->find_lane(model) != nullptr) return group.get();
    }
    return nullptr;
  }
};

Dispatch::Dispatch(boost::asio::io_context& io, Options options, std::vector<GroupOptions> groups)
    : impl_(std::make_unique<Impl>(io)) {
  impl_->options = std::move(options);
  for (GroupOptions& group : groups) {
    const std::string base_dir = group.base_dir;
    impl_->groups.emplace(
        base_dir, std::make_unique<Group>(io, impl_->file_work, impl_->options, std::move(group), impl_->events));
  }
}

Dispatch::~Dispatch() = default;

void Dispatch::set_events(Events events) {
  impl_->events = std::move(events);
}

void Dispatch::start() {
  for (auto& [base_dir, group] : impl_->groups) {
    group->settle();
    group->start();
  }
}

void Dispatch::stop() {
  for (auto& [base_dir, group] : impl_->groups) group->stop();
}

bool Dispatch::has_group(const std::string& base_dir) const {
  return impl_->groups.contains(base_dir);
}

GroupStatus Dispatch::status(const std::string& base_dir) const {
  return impl_->group(base_dir).status();
}

std::vector<std::pair<GroupOptions, GroupStatus>> Dispatch::groups() const {
  std::vector<std::pair<GroupOptions, GroupStatus>> all;
  for (const auto& [base_dir, group] : impl_->groups) all.emplace_back(group->options(), group->status());
  return all;
}

boost::asio::awaitable<void> Dispatch::refresh_counters(std::chrono::milliseconds limit) {
  for (auto& [base_dir, group] : impl_->groups) co_await group->refresh_counters(limit);
}

void Dispatch::set_token_table(const std::string& base_dir, const std::string& path) {
  impl_->group(base_dir).set_token_table(path);
}

NumberState Dispatch::number_state(const std::string& model, std::int64_t seq) const {
  Group* group = impl_->group_of(model);
  return group == nullptr ? NumberState::fresh : group->find_lane(model)->state(seq);
}

bool Dispatch::all_wait_for(const std::string& model, std::int64_t seq) const {
  Group* group = impl_->group_of(model);
  return group != nullptr && group->find_lane(model)->all_wait_for(seq);
}

void Dispatch::submit(const Item& item) {
  impl_->group(item.base_dir).submit(item);
}

bool Dispatch::consume(const std::string& model, std::int64_t seq) {
  Group* group = impl_->group_of(model);
  if (group == nullptr) return false;
  group->consume(*group->find_lane(model), seq);
  return true;
}

void Dispatch::completed(RequestId number, Effect effect) {
  for (auto& [base_dir, group] : impl_->groups) {
    if (group->owns(number)) return group->completed(number, effect);
  }
}

void Dispatch::cancel_sample(RequestId number) {
  for (auto& [base_dir, group] : impl_->groups) group->cancel_sample(number);
}

std::vector<RequestId> Dispatch::close_lane(const std::string& model) {
  Group* group = impl_->group_of(model);
  return group == nullptr ? std::vector<RequestId>() : group->close_lane(*group->find_lane(model));
}

void Dispatch::drop_version(const std::string& base_dir, const std::string& version) {
  impl_->group(base_dir).drop_version(version);
}

std::string Dispatch::base_dir_of(const std::string& model) const {
  const Group* group = impl_->group_of(model);
  return group == nullptr ? std::string() : group->options().base_dir;
}

bool Dispatch::needed(RequestId number) const {
  for (const auto& [base_dir, group] : impl_->groups) {
    if (group->needed(number)) return true;
  }
  return false;
}

LaneCounts Dispatch::counts() const {
  LaneCounts counts;
  for (const auto& [base_dir, group] : impl_->groups) group->count(counts);
  return counts;
}

std::size_t Dispatch::queued_samples() const {
  std::size_t queued = 0;
  for (const auto& [base_dir, group] : impl_->groups) queued += group->queued_samples();
  return queued;
}

std::vector<Dispatch::LaneState> Dispatch::lane_states() const {
  std::vector<LaneState> states;
  for (const auto& [base_dir, group] : impl_->groups) {
    for (const auto& [model, lane] : group->lanes()) {
      if (lane.closed() && lane.entries().empty()) continue;
      states.push_back({base_dir,
                        model,
                        lane.horizon(),
                        {lane.consumed().begin(), lane.consumed().end()},
                        {lane.versions.begin(), lane.versions.end()},
                        lane.closed()});
    }
  }
  return states;
}

std::string Dispatch::snapshot_of(const std::string& base_dir) const {
  return impl_->group(base_dir).snapshot_dir();
}

void Dispatch::restore_lane(const LaneState& state) {
  Group& group = impl_->group(state.base_dir);
  Lane& lane = group.lane(state.model);
  lane.set_horizon(state.horizon);
  for (const std::int64_t seq : state.consumed) lane.consume(seq);
  for (const std::string& version : state.versions) group.restore_version(lane, version);
  if (state.closed) lane.restore_closed();
}

void Dispatch::restore_snapshot(const std::string& base_dir, const SnapshotCut& cut) {
  impl_->group(base_dir).restore_snapshot(cut);
}

void Dispatch::restore_micro_batch(const std::string& base_dir, const wp::MicroBatch& micro_batch) {
  impl_->group(base_dir).restore_micro_batch(micro_batch);
}

}  // namespace ht::dispatch
