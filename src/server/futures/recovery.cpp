// What the journal tells at start, and when it may forget.

#include <algorithm>
#include <map>
#include <utility>

#include "base/logging.h"
#include "server/futures/ledger.h"
#include "server/futures/records.h"
#include "worker_protocol/codec.h"

namespace ht::futures {

namespace wp = worker_protocol;

struct Ledger::Replayed {
  struct Done {
    dispatch::Effect effect = dispatch::Effect::none;
    std::size_t bytes = 0;
    store::RecordPosition position;
    std::int64_t time_ms = 0;
  };
  std::map<Number, dispatch::Item> items;
  std::vector<std::pair<Number, Done>> done;  // in the order of their records
  std::vector<std::pair<std::string, std::int64_t>> consumed;
  std::map<std::string, std::vector<wp::MicroBatch>> micro_batches;  // by base_dir
  std::map<std::string, dispatch::Dispatch::LaneState> lanes;        // of the last digest
  std::vector<pb::SessionEnded> ended;
};

void Ledger::replay_record(const store::RecordPosition& position, std::string_view bytes, Replayed& replayed) {
  pb::Record record = parse_record(bytes);
  switch (record.body_case()) {
    case pb::Record::kSubmitted: {
      const pb::Submitted& submitted = record.submitted();
      const Number number = submitted.number();
      next_number_ = std::max(next_number_, number + 1);
      Entry& entry = entries_[number];
      entry.submission = submission_of(submitted);
      entry.submitted = position;
      entry.done_ms = submitted.time_ms();
      if (!entry.submission.natural_key.empty()) by_key_[entry.submission.natural_key] = number;
      dispatch::Item item;
      item.number = number;
      item.base_dir = entry.submission.base_dir;
      item.model = entry.submission.model_id;
      item.seq = entry.submission.operation == Operation::drop_model ? dispatch::kDropSeq : entry.submission.seq_id;
      item.bytes = submitted.work().size();
      if (entry.submission.failure) {
        item.completed = true;
        if (item.model.empty()) item.kind = dispatch::Kind::sample;
        replayed.done.push_back({number, {{}, entry.submission.failure->message.size(), {}, submitted.time_ms()}});
      } else {
        item = dispatch::describe(std::move(item), wp::decode_request(submitted.work()).body);
      }
      replayed.items[number] = std::move(item);
      break;
    }
    case pb::Record::kConsumed:
      replayed.consumed.emplace_back(record.consumed().model_id(), record.consumed().seq_id());
      break;
    case pb::Record::kCompleted: {
      const pb::Completed& completed = record.completed();
      const std::size_t size = completed.has_failed() ? completed.failed().message().size() : completed.body().size();
      replayed.done.push_back({completed.number(), {effect_of(completed), size, position, completed.time_ms()}});
      break;
    }
    case pb::Record::kMicroBatch:
      replayed.micro_batches[record.micro_batch().base_dir()].push_back(micro_batch_of(record.micro_batch()));
      break;
    case pb::Record::kCompositions: {
      auto& all = replayed.micro_batches[record.compositions().base_dir()];
      all.clear();
      for (const pb::MicroBatch& one : record.compositions().micro_batches()) all.push_back(micro_batch_of(one));
      break;
    }
    case pb::Record::kSnapshotTaken: {
      const dispatch::SnapshotCut cut = cut_of(record.snapshot_taken());
      dispatch::SnapshotCut& all = cuts_[record.snapshot_taken().base_dir()];
      all.dir = cut.dir;
      for (const auto& [model, seq] : cut.covered) {
        auto& covered = all.covered.try_emplace(model, seq).first->second;
        covered = std::max(covered, seq);
      }
      break;
    }
    case pb::Record::kSessionEnded:
      replayed.ended.push_back(record.session_ended());
      break;
    case pb::Record::kDigest:
      next_number_ = std::max<Number>(next_number_, record.digest().next_number());
      for (const pb::Lane& lane : record.digest().lanes()) replayed.lanes[lane.model_id()] = lane_of(lane);
      for (const pb::SnapshotTaken& cut : record.digest().snapshots()) cuts_[cut.base_dir()] = cut_of(cut);
      break;
    case pb::Record::BODY_NOT_SET:
      break;
  }
}

void Ledger::recover() {
  Replayed replayed;
  journal_.replay(
      [&](const store::RecordPosition& position, std::string_view bytes) { replay_record(position, bytes, replayed); });
  if (journal_.torn_bytes() > 0) {
    spdlog::warn("the journal's last record was incomplete: {} bytes were cut off", journal_.torn_bytes());
  }
  for (const auto& [number, done] : replayed.done) {
    const auto found = entries_.find(number);
    if (found == entries_.end() || found->second.done) continue;
    Entry& entry = found->second;
    entry.done = true;
    entry.completed = done.position;
    entry.done_ms = done.time_ms;
    entry.outcome_bytes = done.bytes;
    retained_bytes_ += done.bytes;
    done_order_.push_back(number);
    dispatch::Item& item = replayed.items.at(number);
    item.completed = true;
    item.effect = done.effect;
  }
  for (const auto& [model, lane] : replayed.lanes) {
    if (dispatch_.has_group(lane.base_dir)) dispatch_.restore_lane(lane);
    foreign_groups_ = foreign_groups_ || !dispatch_.has_group(lane.base_dir);
  }
  for (const auto& [number, entry] : entries_) {
    if (!entry.done) count_open(entry, true);
  }
  std::size_t unfinished = 0;
  for (const auto& [number, item] : replayed.items) {
    if (!item.completed) ++unfinished;
    if (dispatch_.has_group(item.base_dir)) {
      dispatch_.submit(item);
    } else if (!item.completed || item.effect != dispatch::Effect::none) {
      foreign_groups_ = true;
      spdlog::warn("request {} needs the base model {}, which is not served now: it waits", number, item.base_dir);
    }
  }
  for (const auto& [model, seq] : replayed.consumed) dispatch_.consume(model, seq);
  for (const auto& [base_dir, micro_batches] : replayed.micro_batches) {
    if (!dispatch_.has_group(base_dir)) continue;
    for (const wp::MicroBatch& micro_batch : micro_batches) dispatch_.restore_micro_batch(base_dir, micro_batch);
  }
  for (const auto& [base_dir, cut] : cuts_) {
    if (dispatch_.has_group(base_dir)) dispatch_.restore_snapshot(base_dir, cut);
  }
  // One that ended just before the server did.
  for (const pb::SessionEnded& ended : replayed.ended) {
    close_session(ended.session_id(), {ended.model_ids().begin(), ended.model_ids().end()}, ended.reason());
  }
  drop_inputs();
  spdlog::info("the journal tells of {} requests, {} of them unfinished", entries_.size(), unfinished);
}

bool Ledger::needed(Number number, const Entry& entry) const {
  return !dispatch_.has_group(entry.submission.base_dir) || dispatch_.needed(number);
}

void Ledger::drop_inputs() {
  inputs_.drop_if([this](Number number) {
    const auto found = entries_.find(number);
    return found == entries_.end() || (found->second.done && !needed(number, found->second));
  });
}

void Ledger::schedule_housekeeping() {
  housekeeping_timer_.expires_after(options_.housekeeping);
  housekeeping_timer_.async_wait([this](const boost::system::error_code& cancelled) {
    if (cancelled) return;
    expire();
    drop_inputs();
    trim();
    schedule_housekeeping();
  });
}

void Ledger::expire() {
  const std::int64_t horizon = unix_ms() - options_.retention.count();
  while (!done_order_.empty()) {
    const Number number = done_order_.front();
    Entry& entry = entries_.at(number);
    if (entry.done_ms > horizon && retained_bytes_ <= options_.retention_bytes) break;
    done_order_.pop_front();
    retained_bytes_ -= entry.outcome_bytes;
    if (entry.outcome) held_bytes_ -= entry.outcome_bytes;
    entry.outcome.reset();
    entry.gone = true;
    gone_but_needed_.push_back(number);
  }
  std::erase_if(gone_but_needed_, [this](Number number) {
    const auto found = entries_.find(number);
    if (needed(number, found->second)) return false;
    by_key_.erase(found->second.submission.natural_key);
    entries_.erase(found);
    return true;
  });
}

// Segments before the oldest request that is still known go, once a digest has told what only they told.
void Ledger::trim() {
  if (foreign_groups_ || journal_.first_segment() == journal_.current_segment() || !pending_.empty()) return;
  std::uint64_t oldest = journal_.current_segment();
  for (const auto& [number, entry] : entries_) oldest = std::min(oldest, entry.submitted.segment);
  if (oldest <= journal_.first_segment()) return;
  pb::Record record;
  pb::Digest& digest = *record.mutable_digest();
  digest.set_next_number(next_number_);
  for (const auto& lane : dispatch_.lane_states()) put_lane(lane, *digest.add_lanes());
  for (auto& [base_dir, cut] : cuts_) {
    // Only models that some record may still name.
    std::erase_if(cut.covered, [&](const auto& covered) {
      return dispatch_.base_dir_of(covered.first).empty() &&
             std::none_of(entries_.begin(), entries_.end(),
                          [&](const auto& entry) { return entry.second.submission.model_id == covered.first; });
    });
    put_cut(base_dir, cut, *digest.add_snapshots());
  }
  try {
    journal_.append(record.SerializeAsString());
    journal_.drop_before(oldest);
  } catch (const std::exception& error) {
    spdlog::error("the journal's old segments stay: {}", error.what());
  }
}

}  // namespace ht::futures
