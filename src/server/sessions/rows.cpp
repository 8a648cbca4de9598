#include "server/sessions/rows.h"

#include <boost/json.hpp>

#include <bit>

namespace ht::sessions {
namespace {

using std::chrono::milliseconds;
using store::integer_of;
using store::Row;
using store::text_of;
using store::Value;

std::int64_t to_ms(Clock::time_point time) {
  return std::chrono::duration_cast<milliseconds>(time.time_since_epoch()).count();
}
Clock::time_point from_ms(const Value& value) {
  return Clock::time_point(milliseconds(integer_of(value)));
}

std::string tags_to_json(const std::vector<std::string>& tags) {
  return boost::json::serialize(boost::json::array(tags.begin(), tags.end()));
}
std::vector<std::string> tags_from_json(const std::string& text) {
  std::vector<std::string> tags;
  const boost::json::value parsed = boost::json::parse(text);
  for (const boost::json::value& tag : parsed.as_array()) tags.emplace_back(tag.as_string());
  return tags;
}

}  // namespace

Clock::time_point now_ms() {
  return std::chrono::time_point_cast<milliseconds>(Clock::now());
}

std::vector<SessionRow> read_sessions(store::Database& database) {
  std::vector<SessionRow> rows;
  for (const Row& row :
       database.query("SELECT id, idempotency_key, created_ms, last_heartbeat_ms, state, finish_reason,"
                      " finish_detail, tags, user_metadata, project_id, display_name, sdk_version"
                      " FROM sessions ORDER BY rowid")) {
    rows.push_back({.session = {.id = text_of(row[0]),
                                .created_at = from_ms(row[2]),
                                .last_heartbeat = from_ms(row[3]),
                                .state = static_cast<SessionState>(integer_of(row[4])),
                                .finish_reason = text_of(row[5]),
                                .tags = tags_from_json(text_of(row[7])),
                                .user_metadata = text_of(row[8]),
                                .project_id = text_of(row[9]),
                                .display_name = text_of(row[10]),
                                .sdk_version = text_of(row[11])},
                    .idempotency_key = text_of(row[1]),
                    .finish_detail = text_of(row[6])});
  }
  return rows;
}

std::vector<Model> read_models(store::Database& database) {
  std::vector<Model> models;
  for (const Row& row :
       database.query("SELECT id, session_id, model_seq_id, base_model, base_dir, lora_rank, lora_seed,"
                      " train_attn, train_mlp, train_unembed, user_metadata, created_ms,"
                      " last_request_ms FROM models ORDER BY rowid")) {
    models.push_back({.id = text_of(row[0]),
                      .session_id = text_of(row[1]),
                      .model_seq_id = integer_of(row[2]),
                      .base_model = text_of(row[3]),
                      .base_dir = text_of(row[4]),
                      .lora = {.rank = static_cast<int>(integer_of(row[5])),
                               .seed = std::bit_cast<std::uint64_t>(integer_of(row[6])),
                               .train_attn = integer_of(row[7]) != 0,
                               .train_mlp = integer_of(row[8]) != 0,
                               .train_unembed = integer_of(row[9]) != 0},
                      .user_metadata = text_of(row[10]),
                      .created_at = from_ms(row[11]),
                      .last_request = from_ms(row[12])});
  }
  return models;
}

std::vector<Sampler> read_samplers(store::Database& database) {
  std::vector<Sampler> samplers;
  for (const Row& row : database.query("SELECT id, session_id, base_model, base_dir, model_path, version, version_dir"
                                       " FROM samplers ORDER BY rowid")) {
    samplers.push_back({text_of(row[0]), text_of(row[1]), text_of(row[2]), text_of(row[3]), text_of(row[4]),
                        text_of(row[5]), text_of(row[6])});
  }
  return samplers;
}

void insert_session(store::Database& database, const SessionRow& row) {
  const Session& s = row.session;
  database.execute(
      "INSERT INTO sessions (id, idempotency_key, created_ms, last_heartbeat_ms, state, finish_reason,"
      " finish_detail, tags, user_metadata, project_id, display_name, sdk_version)"
      " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
      {s.id, row.idempotency_key.empty() ? Value(nullptr) : Value(row.idempotency_key), to_ms(s.created_at),
       to_ms(s.last_heartbeat), std::int64_t{static_cast<int>(s.state)}, s.finish_reason, row.finish_detail,
       tags_to_json(s.tags), s.user_metadata, s.project_id, s.display_name, s.sdk_version});
}

void insert_model(store::Database& database, const Model& m) {
  database.execute(
      "INSERT INTO models (id, session_id, model_seq_id, base_model, base_dir, lora_rank, lora_seed,"
      " train_attn, train_mlp, train_unembed, user_metadata, created_ms, last_request_ms)"
      " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
      {m.id, m.session_id, m.model_seq_id, m.base_model, m.base_dir, std::int64_t{m.lora.rank},
       std::bit_cast<std::int64_t>(m.lora.seed), std::int64_t{m.lora.train_attn}, std::int64_t{m.lora.train_mlp},
       std::int64_t{m.lora.train_unembed}, m.user_metadata, to_ms(m.created_at), to_ms(m.last_request)});
}

void insert_sampler(store::Database& database, const Sampler& s) {
  database.execute(
      "INSERT INTO samplers (id, session_id, base_model, base_dir, model_path, version, version_dir)"
      " VALUES (?, ?, ?, ?, ?, ?, ?)",
      {s.id, s.session_id, s.base_model, s.base_dir, s.model_path, s.version, s.version_dir});
}

void delete_session(store::Database& database, const std::string& id) {
  database.execute("DELETE FROM sessions WHERE id = ?", {id});
}

void delete_model(store::Database& database, const std::string& id) {
  database.execute("DELETE FROM models WHERE id = ?", {id});
}

void delete_sampler(store::Database& database, const std::string& id) {
  database.execute("DELETE FROM samplers WHERE id = ?", {id});
}

void write_end(store::Database& database, const SessionRow& row) {
  database.execute(
      "UPDATE sessions SET state = ?, finish_reason = ?, finish_detail = ?, last_heartbeat_ms = ?"
      " WHERE id = ?",
      {std::int64_t{static_cast<int>(row.session.state)}, row.session.finish_reason, row.finish_detail,
       to_ms(row.session.last_heartbeat), row.session.id});
}

void write_heartbeat(store::Database& database, const Session& session) {
  database.execute("UPDATE sessions SET last_heartbeat_ms = ? WHERE id = ?",
                   {to_ms(session.last_heartbeat), session.id});
}

void write_last_request(store::Database& database, const Model& model) {
  database.execute("UPDATE models SET last_request_ms = ? WHERE id = ?", {to_ms(model.last_request), model.id});
}

}  // namespace ht::sessions
