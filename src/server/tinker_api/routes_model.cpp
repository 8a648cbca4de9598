// Models: create_model and create-via-load, get_info.

#include <filesystem>

#include "server/tinker_api/body.h"
#include "server/tinker_api/create_model.h"
#include "server/tinker_api/lora_request.h"
#include "server/tinker_api/routing.h"

namespace ht::tinker_api {
namespace {

namespace fs = std::filesystem;

http::Response create_model(Context& context, const http::Request& request) {
  const json::object body = parse_object(request.body);
  const Fields fields(body);
  const std::string base_model = fields.optional_text("base_model").value_or("");
  if (base_model.empty()) throw user_error("base_model is required");
  const ServedModel& served = context.catalogue.served(base_model);
  check_optimizer_config(fields);
  NewModel model;
  model.base_model = base_model;
  model.base_dir = served.base_dir;
  model.lora = decode_lora_config(fields);
  return submit_new_model(context, request, fields, futures::Operation::create_model, std::move(model));
}

// What get_tokenizer() of the client loads: a directory that it can read, or a hub name.
std::string tokenizer_id(const Context& context, const sessions::Model& model) {
  std::error_code error;
  // The client cuts the id at its first colon.
  if (context.loopback && model.base_dir.find(':') == std::string::npos &&
      fs::exists(fs::path(model.base_dir) / "tokenizer.json", error)) {
    return model.base_dir;
  }
  return model.base_model;
}

http::Response get_info(Context& context, const http::Request& request) {
  const json::object body = parse_object(request.body);
  const sessions::Model model = known_model(context, Fields(body).text("model_id"));
  const ServedModel& served = served_dir(context, model.base_dir, model.base_model);
  return json_response(json::object{{"model_id", model.id},
                                    {"model_data", json::object{{"arch", served.spec.architecture},
                                                                {"model_name", model.base_model},
                                                                {"tokenizer_id", tokenizer_id(context, model)}}},
                                    {"optimizer_config", json::object{{"type", "adamw"}}},
                                    {"is_lora", true},
                                    {"lora_rank", model.lora.rank},
                                    {"model_name", model.base_model},
                                    {"type", "get_info"}});
}

}  // namespace

http::Response submit_new_model(Context& context, const http::Request& request, const Fields& fields,
                                futures::Operation operation, NewModel from) {
  const std::string session_id = fields.text("session_id");
  active_session(context, session_id);
  sessions::Model model;
  model.session_id = session_id;
  model.model_seq_id = fields.bounded("model_seq_id", -1, 0, INT32_MAX);
  if (model.model_seq_id < 0) throw user_error("field \"model_seq_id\" is required");
  model.id = session_id + ":train:" + std::to_string(model.model_seq_id);
  model.base_model = from.base_model;
  model.base_dir = from.base_dir;
  model.lora = from.lora;
  model.created_at = model.last_request = sessions::Clock::now();
  const auto metadata = fields.text_map("user_metadata");
  if (!metadata.empty()) model.user_metadata = json::serialize(json::value_from(metadata));

  futures::Submission submission;
  submission.operation = operation;
  submission.session_id = session_id;
  submission.model_id = model.id;
  submission.base_dir = model.base_dir;
  submission.natural_key = model.id;
  submission.fingerprint = digest(request.body);
  submission.context = json::serialize(json::object{{"path", from.path}});
  // The model first: get_info may come right after the answer. A retry keeps the first one's drawn seed.
  const sessions::Model created = context.sessions.create_model(std::move(model));
  submission.work = worker_protocol::CreateAdapter{created.id, created.lora, from.load_dir, from.load_optimizer};
  const futures::Submitted submitted = context.futures.submit(std::move(submission));
  return json_response(json::object{{"request_id", submitted.request_id}, {"model_id", created.id}});
}

void add_model_routes(http::Router& router, Context& context) {
  add(router, context, "POST", "/create_model", create_model);
  add(router, context, "POST", "/get_info", get_info);
}

}  // namespace ht::tinker_api
