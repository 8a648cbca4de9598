#include "server/sessions/sessions.h"

#include <algorithm>
#include <array>
#include <random>
#include <unordered_map>
#include <unordered_set>

#include "base/error.h"
#include "base/logging.h"
#include "server/sessions/rows.h"

namespace ht::sessions {
namespace {

using Steady = std::chrono::steady_clock;

// A random UUID (RFC 9562, version 4). std::random_device is getrandom(2): nobody guesses another's session.
std::string make_uuid() {
  std::random_device random;
  std::array<std::uint32_t, 4> words = {random(), random(), random(), random()};
  words[1] = (words[1] & 0xffff0fff) | 0x00004000;
  words[2] = (words[2] & 0x3fffffff) | 0x80000000;
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  for (int i = 0; i < 32; ++i) {
    if (i == 8 || i == 12 || i == 16 || i == 20) text += '-';
    text += kDigits[(words[static_cast<std::size_t>(i / 8)] >> (28 - 4 * (i % 8))) & 15];
  }
  return text;
}

template <typename T>
std::vector<T> page(const std::vector<const T*>& oldest_first, std::size_t limit, std::size_t offset) {
  std::vector<T> result;
  for (std::size_t i = offset; i < oldest_first.size() && result.size() < limit; ++i) {
    result.push_back(*oldest_first[oldest_first.size() - 1 - i]);
  }
  return result;
}

// The maps' nodes never move, so the order lists and active_session() may point into them.
class StoredSessions : public Sessions {
 public:
  explicit StoredSessions(store::Database& database) : database_(database) {
    const auto now = Steady::now();
    last_sweep_ = now;
    for (SessionRow& row : read_sessions(database_)) remember(std::move(row), now);
    for (Model& model : read_models(database_)) remember(std::move(model));
    for (Sampler& sampler : read_samplers(database_)) remember(std::move(sampler));
  }

  ~StoredSessions() override {
    try {
      write_times();
    } catch (const std::exception& error) {
      spdlog::warn("the last heartbeats are not written: {}", error.what());
    }
  }

  Session create_session(Session fields, const std::string& idempotency_key) override {
    if (!idempotency_key.empty()) {
      if (const auto known = by_key_.find(idempotency_key); known != by_key_.end()) {
        return sessions_.at(known->second).row.session;
      }
    }
    fields.id = make_uuid();
    fields.created_at = fields.last_heartbeat = now_ms();
    fields.state = SessionState::active;
    fields.finish_reason.clear();
    SessionRow row{.session = std::move(fields), .idempotency_key = idempotency_key};
    insert_session(database_, row);
    return remember(std::move(row), Steady::now());
  }

  std::optional<Session> find_session(const std::string& id) const override {
    const auto found = sessions_.find(id);
    return found == sessions_.end() ? std::nullopt : std::optional(found->second.row.session);
  }

  const Session& active_session(const std::string& id) const override {
    const Session& session = known(id).row.session;
    if (session.state == SessionState::finished) {
      throw user_error("session " + id + " is over: it was finished (" + session.finish_reason + ")");
    }
    if (session.state == SessionState::expired) {
      throw user_error("session " + id + " is over: it expired, as no heartbeat came");
    }
    return session;
  }

  bool heartbeat(const std::string& id) override {
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) throw user_error("there is no session " + id);
    if (found->second.row.session.state != SessionState::active) return false;
    found->second.row.session.last_heartbeat = now_ms();
    found->second.heard = Steady::now();
    unwritten_sessions_.insert(id);
    return true;
  }

  void finish(const std::string& id, const std::string& reason, const std::string& detail) override {
    known(id);
    end(sessions_.at(id), SessionState::finished, reason, detail);
  }

  std::vector<Session> list_sessions(std::size_t limit, std::size_t offset) const override {
    return page(session_order_, limit, offset);
  }

  Model create_model(Model model) override {
    known(model.session_id);
    model.id = model.session_id + ":train:" + std::to_string(model.model_seq_id);
    if (const auto found = models_.find(model.id); found != models_.end()) return found->second;
    model.created_at = model.last_request = now_ms();
    insert_model(database_, model);
    return remember(std::move(model));
  }

  std::optional<Model> find_model(const std::string& id) const override {
    const auto found = models_.find(id);
    return found == models_.end() ? std::nullopt : std::optional(found->second);
  }

  void touch_model(const std::string& id) override {
    const auto found = models_.find(id);
    if (found == models_.end()) return;
    found->second.last_request = now_ms();
    unwritten_models_.insert(id);
  }

  std::vector<Model> list_models(std::size_t limit, std::size_t offset, std::size_t* total) const override {
    if (total != nullptr) *total = model_order_.size();
    return page(model_order_, limit, offset);
  }

  std::vector<std::string> models_of(const std::string& session_id) const override {
    const auto found = sessions_.find(session_id);
    return found == sessions_.end() ? std::vector<std::string>() : found->second.models;
  }

  Sampler create_sampler(Sampler sampler) override {
    if (const auto found = samplers_.find(sampler.id); found != samplers_.end()) return found->second;
    known(sampler.session_id);
    insert_sampler(database_, sampler);
    return remember(std::move(sampler));
  }

  std::optional<Sampler> find_sampler(const std::string& id) const override {
    const auto found = samplers_.find(id);
    return found == samplers_.end() ? std::nullopt : std::optional(found->second);
  }

  std::vector<std::string> samplers_of(const std::string& session_id) const override {
    const auto found = sessions_.find(session_id);
    return found == sessions_.end() ? std::vector<std::string>() : found->second.samplers;
  }

  bool version_in_use(const std::string& version) const override { return live_versions_.contains(version); }

  void forget(std::chrono::seconds age, const std::function<bool(const std::string&)>& kept) override {
    const auto horizon = Clock::now() - age;
    for (auto it = sessions_.begin(); it != sessions_.end();) {
      Entry& entry = (it++)->second;
      if (entry.row.session.state == SessionState::active || entry.row.session.last_heartbeat > horizon) continue;
      forget_session(entry, kept);
    }
  }

  void on_end(std::function<void(const Session&, const std::string& reason)> listener) override {
    listeners_.push_back(std::move(listener));
  }

  void expire(std::chrono::seconds timeout) override {
    const auto now = Steady::now();
    const auto gap = now - last_sweep_;
    last_sweep_ = now;
    std::vector<Entry*> silent;
    for (auto& [id, entry] : sessions_) {
      if (entry.row.session.state != SessionState::active) continue;
      if (gap > kLongestGap) entry.heard = std::min(now, entry.heard + gap);
      if (now - entry.heard > timeout) silent.push_back(&entry);
    }
    for (Entry* entry : silent) {
      spdlog::info("session {} expired: no heartbeat for {} s", entry->row.session.id, timeout.count());
      end(*entry, SessionState::expired, "expired", "");
    }
    if (now - last_write_ >= std::chrono::seconds(60) || !unwritten_ends_.empty()) {
      last_write_ = now;
      write_times();
    }
  }

 private:
  struct Entry {
    SessionRow row;
    Steady::time_point heard;  // the last heartbeat, or when this process learnt of the session
    std::vector<std::string> models;
    std::vector<std::string> samplers;
  };

  const Entry& known(const std::string& id) const {
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) throw user_error("there is no session " + id);
    return found->second;
  }

  const Session& remember(SessionRow row, Steady::time_point heard) {
    const std::string id = row.session.id;
    if (!row.idempotency_key.empty()) by_key_[row.idempotency_key] = id;
    Entry& entry = sessions_[id];
    entry.row = std::move(row);
    entry.heard = heard;
    session_order_.push_back(&entry.row.session);
    return entry.row.session;
  }
  const Model& remember(Model model) {
    const std::string id = model.id;
    sessions_.at(model.session_id).models.push_back(id);
    const Model& kept = models_[id] = std::move(model);
    model_order_.push_back(&kept);
    return kept;
  }
  const Sampler& remember(Sampler sampler) {
    const std::string id = sampler.id;
    Entry& session = sessions_.at(sampler.session_id);
    session.samplers.push_back(id);
    if (session.row.session.state == SessionState::active) count_version(sampler.version, 1);
    return samplers_[id] = std::move(sampler);
  }

  void end(Entry& entry, SessionState state, const std::string& reason, const std::string& detail) {
    Session& session = entry.row.session;
    if (session.state != SessionState::active) return;
    session.state = state;
    session.finish_reason = reason;
    entry.row.finish_detail = detail;
    count_versions(entry, -1);
    for (const auto& listener : listeners_) {
      try {
        listener(session, reason);
      } catch (const std::exception& error) {
        spdlog::error("ending session {}: {}", session.id, error.what());
      }
    }
    try {
      write_end(database_, entry.row);
    } catch (const std::exception& error) {
      spdlog::error("the end of session {} is not written yet: {}", session.id, error.what());
      unwritten_ends_.insert(session.id);
    }
    unwritten_sessions_.erase(session.id);
  }

  void count_versions(const Entry& entry, int by) {
    for (const std::string& id : entry.samplers) count_version(samplers_.at(id).version, by);
  }
  void count_version(const std::string& version, int by) {
    if (version.empty()) return;
    if ((live_versions_[version] += by) == 0) live_versions_.erase(version);
  }

  void forget_session(Entry& entry, const std::function<bool(const std::string&)>& kept) {
    const std::string id = entry.row.session.id;
    std::vector<std::string> over, staying;
    for (const std::string& model : entry.models) (kept(model) ? staying : over).push_back(model);
    if (entry.samplers.empty() && over.empty() && !staying.empty()) return;
    database_.transaction([&] {
      for (const std::string& sampler : entry.samplers) delete_sampler(database_, sampler);
      for (const std::string& model : over) delete_model(database_, model);
      if (staying.empty()) delete_session(database_, id);
    });
    for (const std::string& sampler : std::exchange(entry.samplers, {})) samplers_.erase(sampler);
    for (const std::string& model : over) {
      std::erase(model_order_, &models_.at(model));
      unwritten_models_.erase(model);
      models_.erase(model);
    }
    entry.models = std::move(staying);
    if (!entry.models.empty()) return;
    std::erase(session_order_, &entry.row.session);
    by_key_.erase(entry.row.idempotency_key);
    sessions_.erase(id);
  }

  void write_times() {
    if (unwritten_sessions_.empty() && unwritten_models_.empty() && unwritten_ends_.empty()) return;
    database_.transaction([&] {
      for (const std::string& id : unwritten_sessions_) write_heartbeat(database_, sessions_.at(id).row.session);
      for (const std::string& id : unwritten_ends_) write_end(database_, sessions_.at(id).row);
      for (const std::string& id : unwritten_models_) write_last_request(database_, models_.at(id));
    });
    unwritten_sessions_.clear();
    unwritten_ends_.clear();
    unwritten_models_.clear();
  }

  store::Database& database_;
  std::unordered_map<std::string, Entry> sessions_;
  std::unordered_map<std::string, Model> models_;
  std::unordered_map<std::string, Sampler> samplers_;
  std::unordered_map<std::string, std::string> by_key_;  // idempotency key -> session
  std::vector<const Session*> session_order_;            // oldest first
  std::vector<const Model*> model_order_;
  std::unordered_set<std::string> unwritten_sessions_;  // whose last heartbeat is newer than its row
  std::unordered_set<std::string> unwritten_models_;
  std::unordered_set<std::string> unwritten_ends_;
  std::unordered_map<std::string, int> live_versions_;  // → samplers of active sessions
  std::vector<std::function<void(const Session&, const std::string&)>> listeners_;
  Steady::time_point last_sweep_;
  Steady::time_point last_write_ = Steady::now();
};

}  // namespace

std::unique_ptr<Sessions> make_sessions(store::Database& database) {
  return std::make_unique<StoredSessions>(database);
}

}  // namespace ht::sessions
