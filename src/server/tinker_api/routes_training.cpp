// forward, forward_backward, optim_step.

#include "server/tinker_api/body.h"
#include "server/tinker_api/decode_forward_backward.h"
#include "server/tinker_api/numbered.h"

namespace ht::tinker_api {
namespace {

using boost::asio::awaitable;
using Message = tinker_public::ForwardBackwardRequest;

struct Parsed {
  std::unique_ptr<Message> message;
  std::string fingerprint;
  std::size_t bytes = 0;  // decoded
};

Parsed parse(std::string_view coding, std::string_view body, std::size_t max_bytes) {
  std::string decoded;
  if (!coding.empty() && coding != "identity") {
    decoded = decode_content(coding, body, max_bytes);
    body = decoded;
  }
  return {parse_forward_backward(body), digest(body), body.size()};
}

struct Decoded {
  DecodedForwardBackward value;
  std::string context;
  std::optional<futures::Failed> failure;
};

// Which datums had targets of two dimensions: their outputs must have, too.
std::string context_of(const std::vector<TargetShape>& shapes) {
  json::array matrices;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    if (shapes[i].k > 0) matrices.push_back(static_cast<std::int64_t>(i));
  }
  return json::serialize(json::object{{"matrices", std::move(matrices)}});
}

Decoded decode(const Message& message, const ServedModel& served, const Limits& limits) {
  Decoded out;
  try {
    out.value = decode_forward_backward(message, served, limits);
    out.context = context_of(out.value.shapes);
  } catch (const Error& error) {
    if (error.category() != ErrorCategory::user) throw;
    out.failure = futures::Failed{ErrorCategory::user, error.what()};
  }
  return out;
}

awaitable<http::Response> forward_backward(Context& context, const http::Request& request) {
  if (request.header("content-type").find("json") != std::string_view::npos) {
    consume_refused(context, request);
    throw user_error(
        "forward_backward takes application/x-protobuf; JSON bodies are of tinker SDK 0.24 and older: "
        "upgrade the tinker package");
  }
  const std::string_view coding = request.header("content-encoding");
  // A few bytes of zstd can stand for many: such bodies never inflate on the io thread.
  const std::size_t weight = coding.empty() ? request.body.size() : SIZE_MAX;
  Parsed parsed;
  std::exception_ptr refused;
  try {
    parsed = co_await offload(context, weight,
                              [&] { return parse(coding, request.body, context.limits.max_decoded_bytes); });
  } catch (const Error&) {
    refused = std::current_exception();
  }
  if (refused) {
    consume_refused(context, request);
    std::rethrow_exception(refused);
  }
  const Message& message = *parsed.message;
  if (message.seq_id() == 0) throw user_error("seq_id is missing (or 0); the first request of a model has number 1");
  const auto operation = message.forward_only() ? futures::Operation::forward : futures::Operation::forward_backward;
  Numbered numbered = begin_numbered(context, operation, message.model_id(), message.seq_id(), parsed.fingerprint);
  const ServedModel& served = *numbered.served;
  Decoded decoded = co_await offload(context, parsed.bytes, [&] { return decode(message, served, context.limits); });
  // The session may have ended while the pool was at work.
  active_session(context, numbered.model.session_id);
  numbered.submission.context = std::move(decoded.context);
  numbered.submission.failure = std::move(decoded.failure);
  co_return submit_numbered(context, std::move(numbered), [&](Numbered& own) {
    if (!own.submission.failure) own.submission.work = std::move(decoded.value.work);
  });
}

double adam_value(const Fields& adam, std::string_view key, double absent, double low, double below) {
  const double value = adam.number(key, absent);
  if (value < low || value >= below) {
    throw user_error(adam.name_of(key) + " = " + std::to_string(value) + " is outside [" + std::to_string(low) + ", " +
                     (below > 1e300 ? "inf" : std::to_string(below)) + ")");
  }
  return value;
}

worker_protocol::AdamParams decode_adam(const Fields& fields) {
  if (fields.find("optimizer_params")) {
    const std::string type = fields.object("optimizer_params").optional_text("type").value_or("");
    throw user_error("optimizer_params of type \"" + type +
                     "\" do not fit the model's optimizer, adamw, which takes adam_params");
  }
  constexpr double kUnbounded = 1.7e308;
  const Fields adam = fields.object("adam_params");
  worker_protocol::AdamParams params;
  params.learning_rate = adam_value(adam, "learning_rate", params.learning_rate, 0, kUnbounded);
  params.beta1 = adam_value(adam, "beta1", params.beta1, 0, 1);
  params.beta2 = adam_value(adam, "beta2", params.beta2, 0, 1);
  params.eps = adam_value(adam, "eps", params.eps, 0, kUnbounded);
  params.weight_decay = adam_value(adam, "weight_decay", params.weight_decay, 0, kUnbounded);
  params.grad_clip_norm = adam_value(adam, "grad_clip_norm", params.grad_clip_norm, 0, kUnbounded);
  return params;
}

http::Response optim_step(Context& context, const http::Request& request) {
  return numbered_json(context, request, futures::Operation::optim_step, [](Numbered& own, const Fields& fields) {
    own.submission.work = worker_protocol::OptimStep{own.model.id, decode_adam(fields)};
  });
}

}  // namespace

void add_training_routes(http::Router& router, Context& context) {
  add_async(router, context, "POST", "/forward_backward", forward_backward);
  add(router, context, "POST", "/optim_step", optim_step);
}

}  // namespace ht::tinker_api
