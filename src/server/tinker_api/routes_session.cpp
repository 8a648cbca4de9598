// Start-up, sessions, telemetry.

#include "server/tinker_api/routing.h"

namespace ht::tinker_api {
namespace {

http::Response client_config(Context&, const http::Request&) {
  return json_response(json::object{
      {"pjwt_auth_enabled", false},
      {"use_pyqwest_transport", true},
      {"parallel_fwdbwd_chunks", true},
      {"proto_compress_fwdbwd", true},
      // SDK 0.25 resumes through weights_info and create_model without it; 0.38 always creates via load.
      {"create_model_via_load_weights", true},
      {"sample_use_retrieve_futures", false},
      {"sample_join_sampling_session", false},
      {"custom_loss_server_side", false},
  });
}

http::Response dynamic_config(Context&, const http::Request&) {
  return json_response(json::object{
      {"refresh_interval_sec", 300}, {"sample_cancel_enabled", true}, {"sample_cancel_max_batch_size", 64}});
}

http::Response create_session(Context& context, const http::Request& request) {
  const json::object body = parse_object(request.body);
  const Fields fields(body);
  sessions::Session session;
  session.tags = fields.text_list("tags");
  if (const json::object* metadata = fields.optional_object("user_metadata")) {
    session.user_metadata = json::serialize(*metadata);
  }
  session.project_id = fields.optional_text("project_id").value_or("");
  session.display_name = fields.optional_text("display_name").value_or("");
  session.sdk_version = fields.optional_text("sdk_version").value_or("");
  const std::string key(request.header("x-idempotency-key"));
  const sessions::Session created = context.sessions.create_session(std::move(session), key);
  return json_response(json::object{{"session_id", created.id}, {"type", "create_session"}});
}

http::Response session_heartbeat(Context& context, const http::Request& request) {
  const json::object body = parse_object(request.body);
  const std::string id = Fields(body).text("session_id");
  if (!context.sessions.find_session(id)) throw HttpError(404, "session \"" + id + "\" is unknown");
  if (!context.sessions.heartbeat(id)) throw HttpError(410, "session \"" + id + "\" is over");
  return json_response(json::object{});
}

http::Response finish_session(Context& context, const http::Request& request) {
  const std::string& id = request.params.at("session");
  if (!context.sessions.find_session(id)) throw HttpError(404, "session \"" + id + "\" is unknown");
  const json::object body = parse_object(request.body);
  const Fields fields(body);
  const std::string reason = fields.object("reason").text("type");
  if (reason != "success" && reason != "errored" && reason != "interrupted") {
    throw user_error("reason.type = \"" + reason + "\"; allowed: success, errored, interrupted");
  }
  context.sessions.finish(id, reason, fields.optional_text("detail").value_or(""));
  return json_response(json::object{});
}

// Events may hold credentials: they are not looked at.
http::Response telemetry(Context&, const http::Request&) {
  return json_response(json::object{{"status", "accepted"}});
}

http::Response capabilities(Context& context, const http::Request&) {
  json::array models;
  for (const ServedModel& model : context.catalogue.models()) {
    for (const std::string& name : model.names) {
      models.push_back(json::object{
          {"model_name", name}, {"max_context_length", model.max_seq_len}, {"trainable", true}, {"sampleable", true}});
    }
  }
  return json_response(json::object{{"supported_models", std::move(models)}});
}

}  // namespace

void add_session_routes(http::Router& router, Context& context) {
  add(router, context, "POST", "/client/config", client_config);
  add(router, context, "POST", "/client/dynamic_config", dynamic_config);
  add(router, context, "POST", "/create_session", create_session);
  add(router, context, "POST", "/session_heartbeat", session_heartbeat);
  add(router, context, "POST", "/sessions/{session}/finish", finish_session);
  add(router, context, "POST", "/telemetry", telemetry);
  add(router, context, "GET", "/get_server_capabilities", capabilities);
}

}  // namespace ht::tinker_api
