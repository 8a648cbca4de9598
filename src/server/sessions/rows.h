#pragma once

// Sessions, models and samplers as rows of the database.

#include <string>
#include <vector>

#include "server/sessions/sessions.h"
#include "server/store/database.h"

namespace ht::sessions {

struct SessionRow {
  Session session;
  std::string idempotency_key;
  std::string finish_detail;
};

// Oldest first.
std::vector<SessionRow> read_sessions(store::Database& database);
std::vector<Model> read_models(store::Database& database);
std::vector<Sampler> read_samplers(store::Database& database);

void insert_session(store::Database& database, const SessionRow& row);
void insert_model(store::Database& database, const Model& model);
void insert_sampler(store::Database& database, const Sampler& sampler);
void delete_session(store::Database& database, const std::string& id);
void delete_model(store::Database& database, const std::string& id);
void delete_sampler(store::Database& database, const std::string& id);
void write_end(store::Database& database, const SessionRow& row);
void write_heartbeat(store::Database& database, const Session& session);
void write_last_request(store::Database& database, const Model& model);

// The database keeps milliseconds: what is handed out before and after a restart is the same.
Clock::time_point now_ms();

}  // namespace ht::sessions
