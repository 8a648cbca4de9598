// Training runs, checkpoints, sessions.

#include <algorithm>

#include "server/tinker_api/encode.h"
#include "server/tinker_api/routing.h"
#include "server/tinker_api/saved_context.h"

namespace ht::tinker_api {
namespace {

using checkpoints::Checkpoint;
using checkpoints::Kind;
using checkpoints::TinkerPath;

constexpr std::int64_t kMaxPage = 1000;
constexpr std::int64_t kMaxOffset = INT32_MAX;

json::object checkpoint_json(const Checkpoint& checkpoint) {
  json::object out{{"checkpoint_id", checkpoint.path.checkpoint_id()},
                   {"checkpoint_type", checkpoints::type_of(checkpoint.path.kind)},
                   {"time", rfc3339(checkpoint.created_at)},
                   {"tinker_path", checkpoint.path.str()},
                   {"size_bytes", checkpoint.size_bytes},
                   {"public", checkpoint.is_public}};
  if (!checkpoint.user_metadata.empty()) out["user_metadata"] = json::value_from(checkpoint.user_metadata);
  if (checkpoint.expires_at) out["expires_at"] = rfc3339(*checkpoint.expires_at);
  return out;
}

json::object run_json(Context& context, const sessions::Model& model) {
  json::object out{{"training_run_id", model.id},
                   {"base_model", model.base_model},
                   {"model_owner", context.model_owner},
                   {"is_lora", true},
                   {"lora_rank", model.lora.rank},
                   {"corrupted", false},
                   {"last_request_time", rfc3339(model.last_request)}};
  // Newest first.
  for (const Checkpoint& checkpoint : context.checkpoints.list_run(model.id)) {
    const char* key = checkpoint.path.kind == Kind::weights ? "last_checkpoint" : "last_sampler_checkpoint";
    if (!out.contains(key)) out[key] = checkpoint_json(checkpoint);
  }
  if (!model.user_metadata.empty()) out["user_metadata"] = json::parse(model.user_metadata);
  return out;
}

json::object cursor(std::int64_t limit, std::int64_t offset, std::size_t total) {
  return {{"offset", offset}, {"limit", limit}, {"total_count", total}};
}

http::Response list_runs(Context& context, const http::Request& request) {
  const std::int64_t limit = query_integer(request, "limit", 20, 0, kMaxPage);
  const std::int64_t offset = query_integer(request, "offset", 0, 0, kMaxOffset);
  std::size_t total = 0;
  std::vector<sessions::Model> models;
  const auto project = request.query.find("project_id");
  if (project == request.query.end()) {
    models = context.sessions.list_models(static_cast<std::size_t>(limit), static_cast<std::size_t>(offset), &total);
  } else {
    // A run's project is its session's.
    for (sessions::Model& model : context.sessions.list_models(SIZE_MAX >> 1, 0, nullptr)) {
      const auto session = context.sessions.find_session(model.session_id);
      if (!session || session->project_id != project->second) continue;
      const auto index = static_cast<std::int64_t>(total++);
      if (index >= offset && index < offset + limit) models.push_back(std::move(model));
    }
  }
  json::array runs;
  for (const sessions::Model& model : models) runs.push_back(run_json(context, model));
  return json_response(json::object{{"training_runs", std::move(runs)}, {"cursor", cursor(limit, offset, total)}});
}

http::Response get_run(Context& context, const http::Request& request) {
  return json_response(run_json(context, known_model(context, request.params.at("run"))));
}

json::array checkpoints_json(const std::vector<Checkpoint>& list) {
  json::array out;
  for (const Checkpoint& checkpoint : list) out.push_back(checkpoint_json(checkpoint));
  return out;
}

http::Response list_run_checkpoints(Context& context, const http::Request& request) {
  const sessions::Model model = known_model(context, request.params.at("run"));
  return json_response(json::object{{"checkpoints", checkpoints_json(context.checkpoints.list_run(model.id))}});
}

http::Response list_checkpoints(Context& context, const http::Request& request) {
  const std::int64_t limit = query_integer(request, "limit", 100, 0, kMaxPage);
  const std::int64_t offset = query_integer(request, "offset", 0, 0, kMaxOffset);
  std::size_t total = 0;
  const auto list = context.checkpoints.list(static_cast<std::size_t>(limit), static_cast<std::size_t>(offset), &total);
  return json_response(json::object{{"checkpoints", checkpoints_json(list)}, {"cursor", cursor(limit, offset, total)}});
}

// The path that {run}, {kind} and {name} stand for.
TinkerPath path_of(const http::Request& request) {
  const std::string& kind = request.params.at("kind");
  TinkerPath path{request.params.at("run"), Kind::weights, request.params.at("name")};
  if (kind == checkpoints::name_of(Kind::sampler_weights)) {
    path.kind = Kind::sampler_weights;
  } else if (kind != checkpoints::name_of(Kind::weights)) {
    throw HttpError(404, "there is no checkpoint " + kind + "/" + path.name + " of " + path.run +
                             "; kinds are weights and sampler_weights");
  }
  return path;
}

http::Response found(bool done, const TinkerPath& path) {
  if (!done) throw HttpError(404, "there is no checkpoint " + path.str() + ": it was deleted or expired");
  return json_response(json::object{});
}

http::Response delete_checkpoint(Context& context, const http::Request& request) {
  const TinkerPath path = path_of(request);
  return found(context.checkpoints.remove(path), path);
}

http::Response publish(Context& context, const http::Request& request) {
  const TinkerPath path = path_of(request);
  return found(context.checkpoints.set_public(path, true), path);
}

http::Response unpublish(Context& context, const http::Request& request) {
  const TinkerPath path = path_of(request);
  return found(context.checkpoints.set_public(path, false), path);
}

http::Response set_ttl(Context& context, const http::Request& request) {
  const TinkerPath path = path_of(request);
  const json::object body = parse_object(request.body);
  std::optional<std::chrono::seconds> ttl;
  const Fields fields(body);
  if (fields.find("ttl_seconds")) {
    ttl = std::chrono::seconds(fields.bounded("ttl_seconds", 0, kMinTtlSeconds, kMaxTtlSeconds));
  }
  return found(context.checkpoints.set_ttl(path, ttl), path);
}

http::Response list_sessions(Context& context, const http::Request& request) {
  const auto limit = static_cast<std::size_t>(query_integer(request, "limit", 20, 0, kMaxPage));
  const auto offset = static_cast<std::size_t>(query_integer(request, "offset", 0, 0, kMaxOffset));
  json::array ids;
  for (const sessions::Session& session : context.sessions.list_sessions(limit, offset)) ids.emplace_back(session.id);
  return json_response(json::object{{"sessions", std::move(ids)}});
}

http::Response get_session(Context& context, const http::Request& request) {
  const std::string& id = request.params.at("session");
  const auto session = context.sessions.find_session(id);
  if (!session) throw HttpError(404, "session \"" + id + "\" is unknown");
  json::object out{{"training_run_ids", json::value_from(context.sessions.models_of(id))},
                   {"sampler_ids", json::value_from(context.sessions.samplers_of(id))}};
  if (!session->user_metadata.empty()) out["user_metadata"] = json::parse(session->user_metadata);
  if (!session->display_name.empty()) out["display_name"] = session->display_name;
  return json_response(out);
}

}  // namespace

void add_rest_routes(http::Router& router, Context& context) {
  add(router, context, "GET", "/training_runs", list_runs);
  add(router, context, "GET", "/training_runs/{run}", get_run);
  add(router, context, "GET", "/training_runs/{run}/checkpoints", list_run_checkpoints);
  add(router, context, "GET", "/checkpoints", list_checkpoints);
  const std::string checkpoint = "/training_runs/{run}/checkpoints/{kind}/{name}";
  add(router, context, "DELETE", checkpoint, delete_checkpoint);
  add(router, context, "POST", checkpoint + "/publish", publish);
  add(router, context, "DELETE", checkpoint + "/publish", unpublish);
  add(router, context, "PUT", checkpoint + "/ttl", set_ttl);
  add(router, context, "GET", "/sessions", list_sessions);
  add(router, context, "GET", "/sessions/{session}", get_session);
}

}  // namespace ht::tinker_api
