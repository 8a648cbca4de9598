// create_sampling_session, samplers, asample.

#include "server/tinker_api/body.h"
#include "server/tinker_api/decode_sample.h"
#include "server/tinker_api/lora_request.h"
#include "server/tinker_api/routing.h"

namespace ht::tinker_api {
namespace {

using boost::asio::awaitable;

http::Response create_sampling_session(Context& context, const http::Request& request) {
  const json::object body = parse_object(request.body);
  const Fields fields(body);
  const std::string session_id = fields.text("session_id");
  active_session(context, session_id);
  const std::int64_t number = fields.bounded("sampling_session_seq_id", -1, 0, INT64_MAX);
  if (number < 0) throw user_error("field \"sampling_session_seq_id\" is required");
  sessions::Sampler sampler;
  sampler.id = session_id + ":sample:" + std::to_string(number);
  sampler.session_id = session_id;
  if (const auto path = fields.optional_text("model_path")) {
    const checkpoints::Checkpoint checkpoint = known_checkpoint(context, *path);
    sampler.base_model = checkpoint.base_model;
    const ServedModel* own = context.catalogue.find_dir(checkpoint.base_dir);
    sampler.base_dir = own ? own->base_dir : context.catalogue.served(checkpoint.base_model).base_dir;
    sampler.model_path = checkpoint.path.str();
    // A path can be saved again after a delete: the version names the save.
    sampler.version = checkpoint.path.str() + "#" + checkpoint.request_id;
    sampler.version_dir = context.checkpoints.relative(checkpoint.dir);
  } else {
    sampler.base_model = fields.optional_text("base_model").value_or("");
    if (sampler.base_model.empty()) throw user_error("base_model or model_path is required");
    sampler.base_dir = context.catalogue.served(sampler.base_model).base_dir;
  }
  const sessions::Sampler created = context.sessions.create_sampler(sampler);
  if (created.model_path != sampler.model_path || created.base_model != sampler.base_model ||
      created.version != sampler.version) {
    throw user_error("sampling session \"" + created.id + "\" exists already with other weights");
  }
  return json_response(json::object{{"sampling_session_id", created.id}, {"type", "create_sampling_session"}});
}

http::Response get_sampler(Context& context, const http::Request& request) {
  const sessions::Sampler sampler = known_sampler(context, request.params.at("sampler"));
  json::object body{{"sampler_id", sampler.id}, {"base_model", sampler.base_model}};
  if (!sampler.model_path.empty()) body["model_path"] = sampler.model_path;
  return json_response(body);
}

// Parsed here, decoded with the model that the sampler is of.
struct Request {
  json::object body;
  std::string fingerprint;
};

awaitable<http::Response> asample(Context& context, const http::Request& request) {
  const Request parsed = co_await offload(context, request.body.size(), [&] {
    return Request{parse_object(request.body), digest(request.body)};
  });
  const Fields fields(parsed.body);
  const std::string sampler_id = fields.text("sampling_session_id");
  const std::int64_t seq_id = fields.integer("seq_id");
  if (seq_id < 0) throw user_error("seq_id = " + std::to_string(seq_id) + " must not be negative");
  const sessions::Sampler sampler = known_sampler(context, sampler_id);
  active_session(context, sampler.session_id);
  const ServedModel& served = served_dir(context, sampler.base_dir, sampler.base_model);
  const std::uint64_t seed = draw_seed();
  DecodedSample decoded = co_await offload(context, request.body.size(),
                                           [&] { return decode_sample(parsed.body, served, context.limits, seed); });
  active_session(context, sampler.session_id);
  decoded.work.owner = sampler.session_id;
  decoded.work.version = sampler.version;
  decoded.work.version_dir = sampler.version_dir;
  const int num_samples = decoded.work.num_samples;

  futures::Submission submission;
  submission.operation = futures::Operation::sample;
  submission.session_id = sampler.session_id;
  submission.sampler_id = sampler.id;
  submission.seq_id = seq_id;
  submission.base_dir = sampler.base_dir;
  submission.natural_key = sampler.id + "#" + std::to_string(seq_id);
  submission.fingerprint = parsed.fingerprint;
  submission.context = json::serialize(json::object{{"sparse_targets", decoded.sparse_targets}});
  submission.work = std::move(decoded.work);
  const futures::Submitted submitted = context.futures.submit(std::move(submission));

  json::array ids;
  const std::string prefix = sampler.id + ":" + std::to_string(seq_id) + ":";
  for (int i = 0; i < num_samples; ++i) ids.emplace_back(prefix + std::to_string(i));
  co_return json_response(json::object{{"request_id", submitted.request_id}, {"sample_sequence_ids", std::move(ids)}});
}

}  // namespace

void add_sampling_routes(http::Router& router, Context& context) {
  add(router, context, "POST", "/create_sampling_session", create_sampling_session);
  add(router, context, "GET", "/samplers/{sampler}", get_sampler);
  add_async(router, context, "POST", "/asample", asample);
}

}  // namespace ht::tinker_api
