#pragma once

// Numbered requests: idempotency, the journal, long polls, recovery. An endpoint submits an Operation; the answer to
// its poll is the Result that the operation's Completion makes of the worker's reply.

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/error.h"
#include "worker_protocol/messages.h"

namespace ht::futures {

// Thrown by submit() beside Error(user): nothing was accepted, the same request may come again.
class Busy : public Error {  // 429: too much is queued
 public:
  explicit Busy(const std::string& message) : Error(ErrorCategory::server, message) {}
};
class Unavailable : public Error {  // 503: the journal cannot be written (disk full)
 public:
  explicit Unavailable(const std::string& message) : Error(ErrorCategory::server, message) {}
};

enum class Operation : std::uint8_t {
  create_model = 1,
  load_weights = 2,
  forward = 3,
  forward_backward = 4,
  optim_step = 5,
  save_weights = 6,
  save_weights_for_sampler = 7,
  sample = 8,
  drop_model = 9,  // ours: a session ended
};

struct Result {
  std::string content_type;
  std::string body;
};
struct Failed {
  ErrorCategory category = ErrorCategory::server;
  std::string message;
};
using Outcome = std::variant<Result, Failed>;

struct Submission {
  Operation operation = Operation::forward;
  std::string session_id;
  std::string model_id;               // the ordered lane and the name of its adapter; empty for a sample
  std::int64_t seq_id = 0;            // > 0: numbered within the model; 0: create_model / create-via-load, runs first
  std::string sampler_id;             // for a sample
  std::string base_dir;               // the worker group: the base model's canonical directory
  std::string natural_key;            // same key: same request (1.7 of the wire)
  std::string fingerprint;            // digest of the body; another one under the same key is Error(user)
  std::string context;                // JSON for the Completion and for duplicates
  worker_protocol::RequestBody work;  // ignored when `failure` is set
  std::optional<Failed> failure;      // the request is invalid: its number is consumed, its future fails
};

struct Submitted {
  std::string request_id;
  std::string context;  // as first submitted
  bool duplicate = false;
};

// Makes the client's result from the worker's answer, at once or (files have to be moved) in a coroutine that outlives
// the arguments. Runs on the io thread; may throw Error. Must be repeatable: after a crash it can run again for the
// same request_id.
using Completed = std::variant<Outcome, boost::asio::awaitable<Outcome>>;
using Completion = std::function<Completed(const std::string& request_id, const Submission& submission,
                                           const worker_protocol::DoneBody&)>;

enum class PollState { pending, done, gone, unknown };
struct Poll {
  PollState state = PollState::unknown;
  std::shared_ptr<const Outcome> outcome;  // when done
  Operation operation = Operation::forward;
  std::string queue_state = "active";  // "paused_capacity" with a reason while a worker loads or restarts
  std::string queue_state_reason;
};

class Futures {
 public:
  virtual ~Futures() = default;

  // Before recover(): who completes an operation.
  virtual void set_completion(Operation operation, Completion completion) = 0;

  // Journals, then hands to dispatch; never waits. Busy, Unavailable: try again. Error(user): other body under the same
  // key, number below the executed horizon that was never seen. A duplicate answers the first submission's id.
  virtual Submitted submit(Submission submission) = 0;

  // A refused body whose number could be read: the number is consumed.
  virtual void consume(const std::string& model_id, std::int64_t seq_id) = 0;

  // Waits until done or `timeout` passed; wakes at once. `client_gone` is looked at now and then (may be empty).
  virtual boost::asio::awaitable<Poll> poll(const std::string& request_id, std::chrono::milliseconds timeout,
                                            std::function<bool()> client_gone) = 0;

  // Best effort; unknown or finished ids are ignored.
  virtual void cancel(const std::string& request_id) = 0;

  // The session ended: its parked and queued work fails, its samples are cancelled, its models are dropped from
  // workers.
  virtual void end_session(const std::string& session_id, const std::vector<std::string>& model_ids,
                           const std::string& reason) = 0;
  // No sampler uses the version any more: the worker need not keep it. One that does later has it read again.
  virtual void drop_version(const std::string& base_dir, const std::string& version) = 0;

  // For get_info right after create_model, metrics and healthz.
  struct Counts {
    std::size_t parked = 0, queued = 0, running = 0, done = 0;
  };
  virtual Counts counts() const = 0;
};

}  // namespace ht::futures
