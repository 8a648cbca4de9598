#include "server/dispatch/lane.h"

#include <algorithm>
#include <utility>

namespace ht::dispatch {

bool Entry::replayable() const {
  if (item.effect == Effect::none) return false;
  if (item.kind == Kind::forward) return mixed;
  return changes_state(item.kind);
}

NumberState Lane::state(std::int64_t seq) const {
  if (closed_) return NumberState::closed;
  if (entries_.contains(seq) || consumed_.contains(seq)) return NumberState::taken;
  return seq < horizon_ ? NumberState::passed : NumberState::fresh;
}

bool Lane::all_wait_for(std::int64_t seq) const {
  return seq == horizon_ && std::all_of(entries_.begin(), entries_.lower_bound(seq),
                                        [](const auto& entry) { return entry.second.item.completed; });
}

Entry& Lane::add(const Item& item) {
  Entry& entry = entries_[item.seq];
  entry.item = item;
  if (item.kind == Kind::drop) closed_ = true;
  cursor_ = std::min(cursor_, item.seq);
  advance();
  return entry;
}

void Lane::consume(std::int64_t seq) {
  if (seq >= horizon_ && seq != kDropSeq) consumed_.insert(seq);
  advance();
}

void Lane::erase(std::int64_t seq) {
  const auto found = entries_.find(seq);
  if (found == entries_.end()) return;
  const Entry& entry = found->second;
  if (entry.sent && !entry.executed) {
    --in_flight;
    in_flight_bytes -= entry.item.bytes;
  }
  if (seq >= horizon_ && !closed_) consumed_.insert(seq);
  entries_.erase(found);
}

std::vector<Entry> Lane::close(const std::set<RequestId>& kept) {
  closed_ = true;
  std::vector<Entry> taken;
  for (auto it = entries_.begin(); it != entries_.end();) {
    const Item& item = it->second.item;
    if (it->second.sent || item.completed || item.kind == Kind::drop || kept.contains(item.number)) {
      ++it;
    } else {
      taken.push_back(std::move(it->second));
      it = entries_.erase(it);
    }
  }
  consumed_.clear();
  return taken;
}

void Lane::set_horizon(std::int64_t horizon) {
  horizon_ = std::max(horizon_, horizon);
  consumed_.erase(consumed_.begin(), consumed_.lower_bound(horizon_));
  advance();
}

void Lane::restore_closed() {
  closed_ = true;
}

void Lane::advance() {
  while (horizon_ != kDropSeq) {
    if (entries_.contains(horizon_)) {
      ++horizon_;
    } else if (const auto found = consumed_.find(horizon_); found != consumed_.end()) {
      consumed_.erase(found);
      ++horizon_;
    } else {
      return;
    }
  }
}

Entry* Lane::next_to_send() {
  for (auto it = entries_.lower_bound(cursor_); it != entries_.end(); ++it) {
    Entry& entry = it->second;
    // In a closed lane what is left below the drop was sent before, or a replay waits for it.
    if (it->first >= horizon_ && !(closed_ && (entry.item.kind == Kind::drop || entry.item.completed))) return nullptr;
    cursor_ = it->first;
    if (!entry.sent) return &entry;
  }
  return nullptr;
}

Entry* Lane::head() {
  for (auto& [seq, entry] : entries_) {
    if (entry.sent && !entry.executed) return &entry;
    if (!entry.sent) return nullptr;
  }
  return nullptr;
}

void Lane::mark_sent(Entry& entry) {
  entry.sent = true;
  ++in_flight;
  in_flight_bytes += entry.item.bytes;
}

void Lane::mark_executed(Entry& entry) {
  entry.executed = true;
  --in_flight;
  in_flight_bytes -= entry.item.bytes;
}

void Lane::rewind() {
  for (auto& [seq, entry] : entries_) entry.sent = entry.executed = false;
  in_flight = in_flight_bytes = 0;
  cursor_ = 0;
  lost.clear();
}

}  // namespace ht::dispatch
