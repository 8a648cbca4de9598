// Which request ends the worker: suspicion, and careful mode, which finds the guilty one without the others' cost.

#include <fmt/format.h>

#include <fstream>
#include <string>
#include <utility>

#include "base/logging.h"
#include "server/dispatch/group.h"

namespace ht::dispatch {

namespace wp = worker_protocol;

// Processes that the kernel's out-of-memory killer has ended since the machine started; -1: it does not say.
std::int64_t oom_kills() {
  std::ifstream vmstat("/proc/vmstat");
  std::string name;
  for (std::int64_t value = 0; vmstat >> name >> value;) {
    if (name == "oom_kill") return value;
  }
  return -1;
}

// Somebody's kill -9 says nothing about the requests that were running. Out of memory does.
Group::Death Group::death_of(const std::string& reason) const {
  const bool killed = reason.starts_with("killed by signal 9 ");
  if (killed && oom_kills() > oom_kills_) return Death::fault;
  return killed || reason.starts_with("killed by signal 15 ") ? Death::kill : Death::fault;
}

// The first unfinished request of each lane and every running sample may have ended the worker; it surely was the one
// that ran alone. Points: a fault counts as max_kills, a kill as max_crashes, so that both limits are their product.
void Group::blame(const std::string& reason, Death death) {
  const std::int64_t limit = std::int64_t{options_.max_crashes} * options_.max_kills;
  const std::int64_t points = death == Death::fault ? options_.max_kills : options_.max_crashes;
  std::size_t running = samples_in_flight_;
  for (const auto& [model, lane] : lanes_) running += lane.in_flight;
  std::vector<RequestId> guilty;
  bool repeated = false;
  const auto suspect = [&](RequestId number, Suspicion& suspicion) {
    suspicion.any += points;
    repeated = repeated || suspicion.any + points >= limit;
    if (running == 1 && (suspicion.alone += points) >= limit) guilty.push_back(number);
  };
  for (auto& [model, lane] : lanes_) {
    Entry* head = lane.head();
    if (head != nullptr && !head->item.completed) suspect(head->item.number, head->suspicion);
  }
  for (auto& [number, sample] : samples_) {
    if (sample.sent && !sample.cancelled) suspect(number, sample.suspicion);
  }
  if (care_ == Care::exact && death == Death::fault && running != 1) {
    spdlog::warn("{}: unfinished requests that share micro-batches with finished ones are composed anew", group_.name);
    care_ = Care::alone;
  } else if (care_ == Care::none && repeated) {
    spdlog::warn("{}: looking for the request that ends the worker, one at a time", group_.name);
    care_ = Care::exact;
  }
  for (const RequestId number : guilty) {
    const Entry* entry = entry_of(number);
    const Item item = entry != nullptr ? entry->item : samples_.at(number).item;
    if (entry != nullptr) {
      forget(*index_.at(number).lane, item.seq);
      if (item.kind == Kind::publish) settle_version(item, false);
    } else {
      samples_.erase(number);
    }
    const std::int64_t times = limit / points;
    events_.failed(number,
                   wp::Failure{ErrorCategory::server,
                               fmt::format("the worker ended each time that it ran this request ({} times, the last "
                                           "time: {})",
                                           times, reason)},
                   Effect::none);
  }
}

void Group::pump_carefully() {
  bool busy = samples_in_flight_ > 0;
  std::vector<Lane*> heads;
  for (auto& [model, lane] : lanes_) {
    while (Entry* entry = lane.next_to_send()) {
      if (refuse_lost(lane, *entry)) continue;
      if (!entry->item.completed && !replay_names(entry->item.number)) {
        heads.push_back(&lane);
        break;
      }
      send_alone(lane);
      if (state_ != GroupState::ready) return;
    }
    busy = busy || lane.in_flight > 0;
  }
  if (busy) return;
  // Everything that was known is in place. The most suspicious request runs alone.
  Lane* worst_lane = nullptr;
  RequestId worst_sample = 0;
  std::int64_t most = 0;
  for (Lane* lane : heads) {
    if (const std::int64_t of_head = lane->next_to_send()->suspicion.any; of_head > most) {
      worst_lane = lane;
      most = of_head;
    }
  }
  for (const RequestId number : waiting_) {
    const SampleEntry& sample = samples_.at(number);
    const auto version = versions_.find(sample.item.version);
    if (version != versions_.end() && !version->second.made) continue;
    if (sample.suspicion.any > most) {
      worst_sample = number;
      most = sample.suspicion.any;
    }
  }
  if (most == 0) {
    care_ = Care::none;
    return pump();
  }
  const bool sent = worst_sample != 0 ? send_alone(worst_sample) : send_alone(*worst_lane);
  if (!sent && state_ == GroupState::ready) pump_carefully();
}

// The lane's next request.
bool Group::send_alone(Lane& lane) {
  Entry& entry = *lane.next_to_send();
  lane.mark_sent(entry);
  const Item item = entry.item;
  if (send(item.number, item)) return true;
  cannot_send(lane, item);
  return false;
}

bool Group::send_alone(RequestId number) {
  SampleEntry& sample = samples_.at(number);
  waiting_.erase(number);
  sample.sent = true;
  ++samples_in_flight_;
  samples_in_flight_bytes_ += sample.item.bytes;
  const Item item = sample.item;
  if (send(number, item)) return true;
  --samples_in_flight_;
  samples_in_flight_bytes_ -= item.bytes;
  samples_.erase(number);
  return false;
}

}  // namespace ht::dispatch
