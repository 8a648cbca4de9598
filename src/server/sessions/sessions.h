#pragma once

// Sessions, the models and the samplers that live in them, and their expiry. Kept in SQLite (store/database.h), cached
// in memory: a lookup is no query.

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model_spec/lora_sites.h"

namespace ht::store {
class Database;
}

namespace ht::sessions {

using Clock = std::chrono::system_clock;

enum class SessionState { active, finished, expired };

struct Session {
  std::string id;
  Clock::time_point created_at;
  Clock::time_point last_heartbeat;
  SessionState state = SessionState::active;
  std::string finish_reason;  // "success", "errored", "interrupted"
  std::vector<std::string> tags;
  std::string user_metadata;  // JSON object
  std::string project_id;
  std::string display_name;
  std::string sdk_version;
};

struct Model {
  std::string id;  // <session>:train:<model_seq_id>: also the training run's id
  std::string session_id;
  std::int64_t model_seq_id = 0;
  std::string base_model;  // as the client named it
  std::string base_dir;    // canonical directory that serves it
  model_spec::LoraConfig lora;
  std::string user_metadata;  // JSON object or empty
  Clock::time_point created_at;
  Clock::time_point last_request;
};

struct Sampler {
  std::string id;  // <session>:sample:<sampling_session_seq_id>
  std::string session_id;
  std::string base_model;
  std::string base_dir;
  std::string model_path;   // tinker:// path it was made from; empty for the base model and for ephemeral ones
  std::string version;      // name of the adapter version in the worker; empty: the base model
  std::string version_dir;  // its files: their path below the data directory
};

class Sessions {
 public:
  virtual ~Sessions() = default;

  // Same non-empty idempotency key: the same session.
  virtual Session create_session(Session fields, const std::string& idempotency_key) = 0;
  virtual std::optional<Session> find_session(const std::string& id) const = 0;
  // Error(user) for an unknown id, or one whose session is over (the message says so).
  virtual const Session& active_session(const std::string& id) const = 0;
  // False: the session is over (410).
  virtual bool heartbeat(const std::string& id) = 0;
  // First call wins. Ends the session: `on_end` listeners are called, then the end is written, so that a crash between
  // repeats it; if it cannot be written (disk full), expire() tries again. Error(user) for an unknown id.
  virtual void finish(const std::string& id, const std::string& reason, const std::string& detail) = 0;
  virtual std::vector<Session> list_sessions(std::size_t limit, std::size_t offset) const = 0;

  // Same (session, model_seq_id): the first one.
  virtual Model create_model(Model model) = 0;
  virtual std::optional<Model> find_model(const std::string& id) const = 0;
  virtual void touch_model(const std::string& id) = 0;
  // Newest first. total = number before paging.
  virtual std::vector<Model> list_models(std::size_t limit, std::size_t offset, std::size_t* total) const = 0;
  virtual std::vector<std::string> models_of(const std::string& session_id) const = 0;

  // Same id: the first one.
  virtual Sampler create_sampler(Sampler sampler) = 0;
  virtual std::optional<Sampler> find_sampler(const std::string& id) const = 0;
  virtual std::vector<std::string> samplers_of(const std::string& session_id) const = 0;
  // By a sampler of a session that goes on.
  virtual bool version_in_use(const std::string& version) const = 0;

  virtual void on_end(std::function<void(const Session&, const std::string& reason)> listener) = 0;
  // Ends sessions without a heartbeat for `timeout`. Time that the server was down does not count, nor does a gap of
  // more than kLongestGap between two calls: the process was stopped then, and heartbeats could not be read. Also
  // writes the last heartbeats and requests to the database.
  static constexpr std::chrono::seconds kLongestGap{60};
  virtual void expire(std::chrono::seconds timeout) = 0;
  // Sessions that are over and were last heard of more than `age` ago lose their samplers and the models that are not
  // `kept` (a run whose checkpoints are there), and go when no model is left.
  virtual void forget(std::chrono::seconds age, const std::function<bool(const std::string& model)>& kept) = 0;
};

// Reads what the database holds. `database` outlives the result.
std::unique_ptr<Sessions> make_sessions(store::Database& database);

}  // namespace ht::sessions
