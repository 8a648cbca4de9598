#include "server/tinker_api/numbered.h"

#include "server/tinker_api/body.h"

namespace ht::tinker_api {

json::object parse_numbered_body(Context& context, const http::Request& request) {
  try {
    return parse_object(request.body);
  } catch (const Error&) {
    consume_refused(context, request);
    throw;
  }
}

Numbered begin_numbered(Context& context, futures::Operation operation, const std::string& model_id,
                        std::int64_t seq_id, std::string fingerprint) {
  Numbered numbered;
  numbered.model = known_model(context, model_id);
  active_session(context, numbered.model.session_id);
  if (seq_id < 1 || seq_id > kMaxSeqId) {
    throw user_error("seq_id = " + std::to_string(seq_id) + " is outside [1, " + std::to_string(kMaxSeqId) + "]");
  }
  if (context.catalogue.find_dir(numbered.model.base_dir) == nullptr) context.futures.consume(model_id, seq_id);
  numbered.served = &served_dir(context, numbered.model.base_dir, numbered.model.base_model);
  futures::Submission& submission = numbered.submission;
  submission.operation = operation;
  submission.session_id = numbered.model.session_id;
  submission.model_id = model_id;
  submission.seq_id = seq_id;
  submission.base_dir = numbered.model.base_dir;
  submission.natural_key = model_id + "#" + std::to_string(seq_id);
  submission.fingerprint = std::move(fingerprint);
  context.sessions.touch_model(model_id);
  return numbered;
}

http::Response submit_numbered(Context& context, Numbered numbered, const std::function<void(Numbered&)>& build) {
  try {
    build(numbered);
  } catch (const Error& error) {
    if (error.category() != ErrorCategory::user) throw;
    numbered.submission.failure = futures::Failed{ErrorCategory::user, error.what()};
  }
  const std::string model_id = numbered.model.id;
  const futures::Submitted submitted = context.futures.submit(std::move(numbered.submission));
  return json_response(json::object{{"request_id", submitted.request_id}, {"model_id", model_id}});
}

http::Response numbered_json(Context& context, const http::Request& request, futures::Operation operation,
                             const std::function<void(Numbered&, const Fields&)>& build) {
  const json::object body = parse_numbered_body(context, request);
  const Fields fields(body);
  Numbered numbered =
      begin_numbered(context, operation, fields.text("model_id"), fields.integer("seq_id"), digest(request.body));
  return submit_numbered(context, std::move(numbered), [&](Numbered& own) { build(own, fields); });
}

}  // namespace ht::tinker_api
