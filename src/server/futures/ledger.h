#pragma once

// JournalledFutures' implementation. Everything on the io_context's thread.
//
// A request's life here: Submitted is journalled → dispatch has it → the worker's answer becomes an outcome → Completed
// is journalled → polls are answered → retention is over: gone. Its record stays while a recovery may need it.

#include <boost/asio/steady_timer.hpp>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "server/futures/inputs.h"
#include "server/futures/journalled_futures.h"

namespace ht::futures {

class Ledger final : public JournalledFutures {
 public:
  Ledger(boost::asio::io_context& io, store::Journal& journal, dispatch::Dispatch& dispatch, Options options);
  ~Ledger() override;

  void set_completion(Operation operation, Completion completion) override;
  Submitted submit(Submission submission) override;
  void consume(const std::string& model_id, std::int64_t seq_id) override;
  boost::asio::awaitable<Poll> poll(const std::string& request_id, std::chrono::milliseconds timeout,
                                    std::function<bool()> client_gone) override;
  void cancel(const std::string& request_id) override;
  void end_session(const std::string& session_id, const std::vector<std::string>& model_ids,
                   const std::string& reason) override;
  void drop_version(const std::string& base_dir, const std::string& version) override;
  Counts counts() const override;
  void recover() override;

 private:
  using Number = worker_protocol::RequestId;

  struct Entry {
    Submission submission;       // its work only if work_bytes > 0
    std::size_t work_bytes = 0;  // held in memory
    store::RecordPosition submitted;
    bool finishing = false;  // the outcome is on its way into the journal
    bool done = false;
    bool gone = false;                // retention is over
    store::RecordPosition completed;  // if done, and the request was valid
    std::int64_t done_ms = 0;
    std::size_t outcome_bytes = 0;
    std::shared_ptr<const Outcome> outcome;  // or nothing: re-read it
    std::vector<std::shared_ptr<boost::asio::steady_timer>> waiters;
  };
  // Requests that are not done.
  struct Load {
    std::size_t requests = 0, bytes = 0;
  };
  // What waits for the journal (disk full): nothing that depends on it is told before.
  struct Pending {
    std::string record;
    std::function<void(const store::RecordPosition&)> written;
  };
  struct Replayed;  // what recover() collects

  // ledger.cpp
  void check_number(const Submission& submission) const;
  void check_load(const Submission& submission, std::size_t bytes) const;
  void count_open(const Entry& entry, bool opened);
  void accept(Number number, Submission submission, std::size_t bytes, const store::RecordPosition& position);
  Entry* find(const std::string& request_id, PollState* missing);
  void describe_queue(const Entry& entry, Poll& poll) const;
  void submit_drop(const std::string& session_id, const std::string& model_id, const std::string& base_dir);
  void close_session(const std::string& session_id, const std::vector<std::string>& model_ids,
                     const std::string& reason);

  // outcomes.cpp
  worker_protocol::RequestBody body_of(Number number);
  void on_done(Number number, const worker_protocol::DoneBody& body);
  void finish(Number number, Outcome outcome, dispatch::Effect effect);
  void conclude(Number number, Outcome outcome, dispatch::Effect effect);
  void set_done(Number number, std::shared_ptr<const Outcome> outcome, const store::RecordPosition& position,
                std::int64_t time_ms);
  std::shared_ptr<const Outcome> outcome_of_entry(Entry& entry);
  void hold(Number number, Entry& entry, std::shared_ptr<const Outcome> outcome);
  void drop_work(Entry& entry);
  void write(std::string record, std::function<void(const store::RecordPosition&)> written);
  void flush();
  void on_snapshot(const std::string& base_dir, const dispatch::SnapshotCut& cut);

  // recovery.cpp
  void replay_record(const store::RecordPosition& position, std::string_view bytes, Replayed& replayed);
  void schedule_housekeeping();
  void expire();
  void trim();
  bool needed(Number number, const Entry& entry) const;
  void drop_inputs();

  boost::asio::io_context& io_;
  store::Journal& journal_;
  dispatch::Dispatch& dispatch_;
  Options options_;
  std::map<Operation, Completion> completions_;
  Inputs inputs_;

  Load open_;                                      // training requests; the bytes of samples too
  std::unordered_map<std::string, Load> open_of_;  // by model
  Number next_number_ = 1;
  std::unordered_map<Number, Entry> entries_;
  std::unordered_map<std::string, Number> by_key_;
  std::deque<Number> done_order_;       // retained
  std::deque<Number> gone_but_needed_;  // by a recovery
  std::deque<Number> held_;             // outcomes in memory, oldest first
  std::size_t retained_bytes_ = 0, held_bytes_ = 0, work_bytes_ = 0;
  std::map<std::string, dispatch::SnapshotCut> cuts_;  // by base_dir; covered adds up over all cuts
  bool foreign_groups_ = false;  // the journal has work for a base model that is not served now: keep all of it

  std::deque<Pending> pending_;
  bool flushing_ = false;
  boost::asio::steady_timer retry_timer_, housekeeping_timer_;
};

}  // namespace ht::futures
