// From the worker's answer to the client's: outcomes, and what waits for the journal.

#include <boost/asio/co_spawn.hpp>

#include <algorithm>
#include <exception>
#include <utility>

#include "base/logging.h"
#include "server/futures/ledger.h"
#include "server/futures/records.h"
#include "server/futures/work_paths.h"
#include "worker_protocol/codec.h"

namespace ht::futures {

namespace asio = boost::asio;
namespace wp = worker_protocol;

namespace {

constexpr std::chrono::milliseconds kJournalRetry{1000};

Failed failed_of(std::uint64_t number, const std::exception_ptr& thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const Error& error) {
    return {error.category(), error.what()};
  } catch (const std::exception& error) {
    spdlog::error("request {}: its result could not be made: {}", number, error.what());
    return {ErrorCategory::server, error.what()};
  }
}

}  // namespace

wp::RequestBody Ledger::body_of(Number number) {
  const Entry& entry = entries_.at(number);
  wp::RequestBody body = entry.submission.work;
  if (entry.work_bytes == 0) {
    body = wp::decode_request(parse_record(journal_.read(entry.submitted)).submitted().work()).body;
    make_absolute(body, options_.data_dir);
  }
  inputs_.redirect(number, body);
  return body;
}

void Ledger::on_done(Number number, const wp::DoneBody& body) {
  const auto found = entries_.find(number);
  if (found == entries_.end() || found->second.done || found->second.finishing) return;
  Entry& entry = found->second;
  Outcome outcome;
  try {
    const auto completion = completions_.find(entry.submission.operation);
    if (completion != completions_.end()) {
      if (entry.work_bytes == 0) entry.submission.work = body_of(number);
      Completed made = completion->second(id_of(number), entry.submission, body);
      if (auto* later = std::get_if<asio::awaitable<Outcome>>(&made)) {
        entry.finishing = true;
        return asio::co_spawn(io_, std::move(*later), [this, number](const std::exception_ptr& thrown, Outcome result) {
          conclude(number, thrown ? failed_of(number, thrown) : std::move(result), dispatch::Effect::done);
        });
      }
      outcome = std::get<Outcome>(std::move(made));
    } else if (entry.submission.operation == Operation::drop_model) {
      outcome = Result{"application/json", "{}"};
    } else {
      throw server_error("operation " + std::to_string(static_cast<int>(entry.submission.operation)) +
                         " has no completion");
    }
  } catch (...) {
    outcome = failed_of(number, std::current_exception());
  }
  finish(number, std::move(outcome), dispatch::Effect::done);
}

void Ledger::finish(Number number, Outcome outcome, dispatch::Effect effect) {
  const auto found = entries_.find(number);
  if (found == entries_.end() || found->second.done || found->second.finishing) return;
  found->second.finishing = true;
  conclude(number, std::move(outcome), effect);
}

void Ledger::conclude(Number number, Outcome outcome, dispatch::Effect effect) {
  const std::int64_t now = unix_ms();
  std::string record = completed_record(number, outcome, effect, now);
  const std::size_t most = journal_.options().max_record_bytes;
  if (record.size() > most) {
    outcome = Failed{ErrorCategory::server, "the result has " + std::to_string(record.size()) + " bytes: at most " +
                                                std::to_string(most) + " can be kept"};
    record = completed_record(number, outcome, effect, now);
  }
  auto shared = std::make_shared<const Outcome>(std::move(outcome));
  write(std::move(record), [this, number, shared, effect, now](const store::RecordPosition& position) {
    set_done(number, shared, position, now);
    dispatch_.completed(number, effect);
  });
}

void Ledger::set_done(Number number, std::shared_ptr<const Outcome> outcome, const store::RecordPosition& position,
                      std::int64_t time_ms) {
  Entry& entry = entries_.at(number);
  count_open(entry, false);
  entry.done = true;
  entry.finishing = false;
  entry.completed = position;
  entry.done_ms = time_ms;
  entry.outcome_bytes = size_of(*outcome);
  retained_bytes_ += entry.outcome_bytes;
  done_order_.push_back(number);
  drop_work(entry);
  hold(number, entry, std::move(outcome));
  for (const auto& waiter : std::exchange(entry.waiters, {})) waiter->cancel();
}

void Ledger::drop_work(Entry& entry) {
  work_bytes_ -= entry.work_bytes;
  entry.work_bytes = 0;
  entry.submission.work = {};
}

void Ledger::hold(Number number, Entry& entry, std::shared_ptr<const Outcome> outcome) {
  entry.outcome = std::move(outcome);
  held_.push_back(number);
  held_bytes_ += entry.outcome_bytes;
  while (held_.size() > 1) {
    const auto oldest = entries_.find(held_.front());
    const bool stale = oldest == entries_.end() || !oldest->second.outcome;
    if (!stale && held_bytes_ <= options_.memory_bytes) break;
    held_.pop_front();
    if (stale) continue;
    held_bytes_ -= oldest->second.outcome_bytes;
    oldest->second.outcome.reset();
  }
}

std::shared_ptr<const Outcome> Ledger::outcome_of_entry(Entry& entry) {
  if (entry.outcome) return entry.outcome;
  if (entry.submission.failure) return std::make_shared<const Outcome>(*entry.submission.failure);
  return std::make_shared<const Outcome>(outcome_of(parse_record(journal_.read(entry.completed)).completed()));
}

void Ledger::write(std::string record, std::function<void(const store::RecordPosition&)> written) {
  pending_.push_back({std::move(record), std::move(written)});
  // While the journal is stuck, the timer tries again.
  if (pending_.size() == 1) flush();
}

void Ledger::flush() {
  if (flushing_) return;
  flushing_ = true;
  while (!pending_.empty()) {
    store::RecordPosition position;
    try {
      position = journal_.append(pending_.front().record);
    } catch (const std::exception& error) {
      spdlog::error("{}; {} records wait, no result is told before", error.what(), pending_.size());
      retry_timer_.expires_after(kJournalRetry);
      retry_timer_.async_wait([this](const boost::system::error_code& cancelled) {
        if (!cancelled) flush();
      });
      break;
    }
    const auto written = std::move(pending_.front().written);
    pending_.pop_front();
    try {
      if (written) written(position);
    } catch (const std::exception& error) {
      // The record stands, and the others' must be written.
      spdlog::error("what follows from a journalled record failed: {}", error.what());
    }
  }
  flushing_ = false;
}

// The cut stands in for requests whose outcomes are in the journal; the records that still wait may be of later ones.
void Ledger::on_snapshot(const std::string& base_dir, const dispatch::SnapshotCut& cut) {
  journal_.append(snapshot_record(base_dir, cut));
  dispatch::SnapshotCut& all = cuts_[base_dir];
  all.dir = cut.dir;
  for (const auto& [model, seq] : cut.covered) {
    auto& covered = all.covered.try_emplace(model, seq).first->second;
    covered = std::max(covered, seq);
  }
}

}  // namespace ht::futures
