#include "server/futures/ledger.h"

#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>

#include <algorithm>
#include <charconv>
#include <utility>

#include "server/futures/records.h"
#include "server/futures/work_paths.h"
#include "worker_protocol/codec.h"

namespace ht::futures {

namespace asio = boost::asio;
namespace wp = worker_protocol;

namespace {

// How often a parked poll looks whether its client is still there.
constexpr std::chrono::milliseconds kClientCheck{2000};

std::optional<std::uint64_t> number_of(std::string_view id) {
  std::uint64_t number = 0;
  if (id.size() < 2 || id[0] != 'r' || id[1] == '0') return std::nullopt;
  const auto parsed = std::from_chars(id.data() + 1, id.data() + id.size(), number);
  if (parsed.ec != std::errc() || parsed.ptr != id.data() + id.size()) return std::nullopt;
  return number;
}

dispatch::Item item_of(std::uint64_t number, const Submission& submission, std::size_t bytes) {
  dispatch::Item item;
  item.number = number;
  item.base_dir = submission.base_dir;
  item.model = submission.model_id;
  item.seq = submission.operation == Operation::drop_model ? dispatch::kDropSeq : submission.seq_id;
  item.bytes = bytes;
  if (!submission.failure) return dispatch::describe(std::move(item), submission.work);
  item.completed = true;  // its number is consumed
  if (submission.model_id.empty()) item.kind = dispatch::Kind::sample;
  return item;
}

}  // namespace

Ledger::Ledger(asio::io_context& io, store::Journal& journal, dispatch::Dispatch& dispatch, Options options)
    : io_(io),
      journal_(journal),
      dispatch_(dispatch),
      options_(options),
      inputs_(journal.options().dir / "inputs", journal.options().durability),
      retry_timer_(io),
      housekeeping_timer_(io) {
  dispatch::Dispatch::Events events;
  events.body = [this](Number number) { return body_of(number); };
  events.done = [this](Number number, wp::DoneBody body) { on_done(number, body); };
  events.failed = [this](Number number, wp::Failure failure, dispatch::Effect effect) {
    finish(number, Failed{failure.category, failure.message}, effect);
  };
  events.micro_batch = [this](const std::string& base_dir, const wp::MicroBatch& micro_batch) {
    write(micro_batch_record(base_dir, micro_batch), {});
  };
  events.compositions = [this](const std::string& base_dir, const std::vector<wp::MicroBatch>& micro_batches) {
    write(compositions_record(base_dir, micro_batches), {});
  };
  events.snapshot = [this](const std::string& base_dir, const dispatch::SnapshotCut& cut) {
    on_snapshot(base_dir, cut);
  };
  dispatch_.set_events(std::move(events));
  schedule_housekeeping();
}

Ledger::~Ledger() {
  dispatch_.set_events({});
}

void Ledger::set_completion(Operation operation, Completion completion) {
  completions_[operation] = std::move(completion);
}

void Ledger::check_number(const Submission& submission) const {
  if (!dispatch_.has_group(submission.base_dir)) {
    throw user_error("no worker serves the base model " + submission.base_dir);
  }
  if (submission.model_id.empty()) {
    if (dispatch_.queued_samples() >= options_.max_queued_samples) {
      throw Busy("too many samples are queued (" + std::to_string(dispatch_.queued_samples()) + "): try again later");
    }
    return;
  }
  const std::string number = "seq_id " + std::to_string(submission.seq_id) + " of model " + submission.model_id;
  if (submission.seq_id < 0 || submission.seq_id == dispatch::kDropSeq) {
    throw user_error(number + " is out of range: numbers start at 1");
  }
  switch (dispatch_.number_state(submission.model_id, submission.seq_id)) {
    case dispatch::NumberState::fresh:
      return;
    case dispatch::NumberState::passed:
      throw user_error(number + " comes too late: later requests ran already, and this one was never accepted");
    case dispatch::NumberState::taken:
      throw user_error(number + " was used by another request, or by one that was refused");
    case dispatch::NumberState::closed:
      throw user_error("model " + submission.model_id + " is gone: its session has ended");
  }
}

void Ledger::check_load(const Submission& submission, std::size_t bytes) const {
  std::string full;
  const auto check = [&full](std::size_t have, std::size_t more, std::size_t limit, const char* unit,
                             const char* where) {
    if (!full.empty() || have + more <= limit) return;
    full = std::to_string(have) + unit + " of training requests " + where + " wait to be done, at most " +
           std::to_string(limit) + " are taken: try again later";
  };
  check(open_.bytes, bytes, options_.max_bytes, " bytes", "and samples");
  if (!submission.model_id.empty()) {
    const auto found = open_of_.find(submission.model_id);
    const Load of_model = found == open_of_.end() ? Load{} : found->second;
    check(of_model.requests, 1, options_.max_model_requests, "", "of this model");
    check(of_model.bytes, bytes, options_.max_model_bytes, " bytes", "of this model");
    check(open_.requests, 1, options_.max_requests, "", "of all models");
    if (!full.empty() && dispatch_.all_wait_for(submission.model_id, submission.seq_id)) return;
  }
  if (!full.empty()) throw Busy(full);
}

void Ledger::count_open(const Entry& entry, bool opened) {
  const std::size_t bytes = entry.submitted.length;
  const auto count = [opened, bytes](Load& load, std::size_t requests) {
    load.requests = opened ? load.requests + requests : load.requests - requests;
    load.bytes = opened ? load.bytes + bytes : load.bytes - bytes;
  };
  const std::string& model = entry.submission.model_id;
  count(open_, model.empty() ? 0 : 1);
  if (model.empty()) return;
  Load& of_model = open_of_[model];
  count(of_model, 1);
  if (of_model.requests == 0) open_of_.erase(model);
}

Submitted Ledger::submit(Submission submission) {
  if (const auto known = by_key_.find(submission.natural_key); known != by_key_.end()) {
    const Submission& first = entries_.at(known->second).submission;
    if (first.fingerprint != submission.fingerprint) {
      throw user_error("another request was accepted under the same number (" + submission.natural_key +
                       "): a repeated request must have the same body");
    }
    return {id_of(known->second), first.context, true};
  }
  check_number(submission);
  const Number number = next_number_;
  std::string work;
  if (!submission.failure) {
    make_relative(submission.work, options_.data_dir);
    work = wp::encode(wp::Request{number, submission.work});
    make_absolute(submission.work, options_.data_dir);
  }
  const std::size_t bytes = work.size();
  // A request that fits no lane is refused before it is written.
  item_of(number, submission, bytes);
  std::string record = submitted_record(number, submission, std::move(work));
  const std::size_t most = std::min(journal_.options().max_record_bytes, wp::kMaxFrameBytes);
  if (record.size() > most) {
    submission.failure = Failed{ErrorCategory::user, "the request has " + std::to_string(record.size()) +
                                                         " bytes when decoded: at most " + std::to_string(most) +
                                                         " are possible, use smaller batches"};
    record = submitted_record(number, submission, {});
  }
  if (!submission.failure) check_load(submission, record.size());
  store::RecordPosition position;
  try {
    if (!submission.failure) inputs_.keep(number, submission.work);
    position = journal_.append(record);
  } catch (const Error& error) {
    inputs_.drop_if([number](Number kept) { return kept == number; });
    throw Unavailable(std::string("the request was not accepted: ") + error.what());
  }
  ++next_number_;
  Submitted answer{id_of(number), submission.context, false};
  accept(number, std::move(submission), bytes, position);
  return answer;
}

void Ledger::accept(Number number, Submission submission, std::size_t bytes, const store::RecordPosition& position) {
  const dispatch::Item item = item_of(number, submission, bytes);
  if (!submission.natural_key.empty()) by_key_[submission.natural_key] = number;
  Entry& entry = entries_[number];
  entry.submission = std::move(submission);
  entry.submitted = position;
  count_open(entry, true);
  if (entry.submission.failure) {
    set_done(number, std::make_shared<const Outcome>(*entry.submission.failure), {}, unix_ms());
  } else if (work_bytes_ + bytes <= options_.memory_bytes) {
    entry.work_bytes = bytes;
    work_bytes_ += bytes;
  } else {
    entry.submission.work = {};
  }
  dispatch_.submit(item);
}

void Ledger::consume(const std::string& model_id, std::int64_t seq_id) {
  if (seq_id < 1 || seq_id == dispatch::kDropSeq) return;
  // A model whose base is not served now has no lane: its record waits for the base's return.
  if (!dispatch_.base_dir_of(model_id).empty() &&
      dispatch_.number_state(model_id, seq_id) != dispatch::NumberState::fresh)
    return;
  write(consumed_record(model_id, seq_id),
        [this, model_id, seq_id](const store::RecordPosition&) { dispatch_.consume(model_id, seq_id); });
}

Ledger::Entry* Ledger::find(const std::string& request_id, PollState* missing) {
  const auto number = number_of(request_id);
  *missing = number && *number < next_number_ ? PollState::gone : PollState::unknown;
  if (!number) return nullptr;
  const auto found = entries_.find(*number);
  return found == entries_.end() || found->second.gone ? nullptr : &found->second;
}

void Ledger::describe_queue(const Entry& entry, Poll& poll) const {
  const std::string& base_dir = entry.submission.base_dir;
  if (!dispatch_.has_group(base_dir)) {
    poll.queue_state = "paused_capacity";
    poll.queue_state_reason = "no worker serves the base model " + base_dir + " at present";
    return;
  }
  const dispatch::GroupStatus status = dispatch_.status(base_dir);
  if (status.state == dispatch::GroupState::ready) return;
  poll.queue_state = "paused_capacity";
  poll.queue_state_reason = status.text;
}

asio::awaitable<Poll> Ledger::poll(const std::string& request_id, std::chrono::milliseconds timeout,
                                   std::function<bool()> client_gone) {
  const std::string id = request_id;
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  for (;;) {
    Poll answer;
    Entry* entry = find(id, &answer.state);
    if (entry == nullptr) co_return answer;
    answer.operation = entry->submission.operation;
    if (entry->done) {
      answer.state = PollState::done;
      answer.outcome = outcome_of_entry(*entry);
      co_return answer;
    }
    const auto now = std::chrono::steady_clock::now();
    if (now >= deadline || (client_gone && client_gone())) {
      answer.state = PollState::pending;
      describe_queue(*entry, answer);
      co_return answer;
    }
    auto timer = std::make_shared<asio::steady_timer>(io_);
    timer->expires_at(client_gone ? std::min(deadline, now + kClientCheck) : deadline);
    entry->waiters.push_back(timer);
    boost::system::error_code woken;
    co_await timer->async_wait(asio::redirect_error(asio::use_awaitable, woken));
    if (PollState missing; (entry = find(id, &missing)) != nullptr) std::erase(entry->waiters, timer);
  }
}

void Ledger::cancel(const std::string& request_id) {
  PollState missing;
  const Entry* entry = find(request_id, &missing);
  if (entry == nullptr || entry->done || entry->finishing || entry->submission.operation != Operation::sample) return;
  const Number number = *number_of(request_id);
  dispatch_.cancel_sample(number);
  finish(number, Failed{ErrorCategory::user, "the request was cancelled"}, dispatch::Effect::none);
}

void Ledger::end_session(const std::string& session_id, const std::vector<std::string>& model_ids,
                         const std::string& reason) {
  write(session_ended_record(session_id, model_ids, reason),
        [this, session_id, model_ids, reason](const store::RecordPosition&) {
          close_session(session_id, model_ids, reason);
        });
}

void Ledger::close_session(const std::string& session_id, const std::vector<std::string>& model_ids,
                           const std::string& reason) {
  const Failed ended{ErrorCategory::user, "the session has ended (" + reason + ")"};
  std::vector<Number> over;
  for (const std::string& model : model_ids) {
    const std::string base_dir = dispatch_.base_dir_of(model);
    if (base_dir.empty()) continue;
    const auto taken = dispatch_.close_lane(model);
    over.insert(over.end(), taken.begin(), taken.end());
    submit_drop(session_id, model, base_dir);
  }
  for (const auto& [number, entry] : entries_) {
    if (entry.done || entry.finishing || entry.submission.session_id != session_id ||
        entry.submission.operation != Operation::sample) {
      continue;
    }
    over.push_back(number);
  }
  std::sort(over.begin(), over.end());
  for (const Number number : over) {
    dispatch_.cancel_sample(number);
    finish(number, ended, dispatch::Effect::none);
  }
}

void Ledger::drop_version(const std::string& base_dir, const std::string& version) {
  if (dispatch_.has_group(base_dir)) dispatch_.drop_version(base_dir, version);
}

void Ledger::submit_drop(const std::string& session_id, const std::string& model_id, const std::string& base_dir) {
  Submission drop;
  drop.operation = Operation::drop_model;
  drop.session_id = session_id;
  drop.model_id = model_id;
  drop.base_dir = base_dir;
  drop.natural_key = "drop:" + model_id;
  drop.work = wp::DropAdapter{model_id};
  if (by_key_.contains(drop.natural_key)) return;
  const Number number = next_number_++;
  std::string work = wp::encode(wp::Request{number, drop.work});
  const std::size_t bytes = work.size();
  std::string record = submitted_record(number, drop, std::move(work));
  write(std::move(record), [this, number, drop = std::move(drop), bytes](const store::RecordPosition& position) {
    accept(number, drop, bytes, position);
  });
}

Futures::Counts Ledger::counts() const {
  const dispatch::LaneCounts lanes = dispatch_.counts();
  return {lanes.parked, lanes.queued, lanes.running, done_order_.size()};
}

std::unique_ptr<JournalledFutures> make_futures(asio::io_context& io, store::Journal& journal,
                                                dispatch::Dispatch& dispatch, Options options) {
  return std::make_unique<Ledger>(io, journal, dispatch, options);
}

}  // namespace ht::futures
