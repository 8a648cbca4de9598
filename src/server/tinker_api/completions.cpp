// From the worker's answers to the SDK's results. Each may run again after a crash.

#include <boost/json.hpp>

#include "server/tinker_api/encode.h"
#include "server/tinker_api/routing.h"
#include "server/tinker_api/saved_context.h"

namespace ht::tinker_api {

std::string SavedContext::serialize() const {
  json::object object{{"path", path.str()}, {"key", key}, {"overwrite", overwrite}};
  if (ttl_seconds) object["ttl_seconds"] = *ttl_seconds;
  object["user_metadata"] = json::value_from(user_metadata);
  return json::serialize(object);
}

SavedContext SavedContext::parse(const std::string& text) {
  const json::object object = parse_object(text);
  const Fields fields(object);
  return {checkpoints::TinkerPath::parse(fields.text("path")), fields.text("key"),
          fields.optional_integer("ttl_seconds"), fields.boolean("overwrite", false), fields.text_map("user_metadata")};
}

namespace {

using boost::asio::awaitable;
using futures::Completed;
using futures::Outcome;
using futures::Result;
using futures::Submission;
using worker_protocol::DoneBody;

template <typename T>
const T& answer(const DoneBody& done) {
  if (const T* body = std::get_if<T>(&done)) return *body;
  throw server_error("the worker answered with a message of the wrong kind");
}

template <typename T>
const T& work_of(const Submission& submission) {
  if (const T* work = std::get_if<T>(&submission.work)) return *work;
  throw server_error("the journal holds a request of the wrong kind");
}

Result json_result(const json::object& object) {
  return {"application/json", json::serialize(object)};
}

Outcome created(const std::string&, const Submission& submission, const DoneBody&) {
  return json_result({{"model_id", submission.model_id}, {"type", "create_model"}});
}

Outcome loaded(const std::string&, const Submission& submission, const DoneBody&) {
  const json::object context = parse_object(submission.context);
  return json_result(
      {{"path", Fields(context).text("path")}, {"model_id", submission.model_id}, {"type", "load_weights"}});
}

Outcome trained(const std::string&, const Submission& submission, const DoneBody& done) {
  const auto& batch = work_of<worker_protocol::ForwardBackward>(submission).batch;
  std::vector<TargetShape> shapes;
  shapes.reserve(static_cast<std::size_t>(batch.num_datums()));
  for (int i = 0; i < batch.num_datums(); ++i) shapes.push_back({batch.cu_seqlens[i + 1] - batch.cu_seqlens[i], 0});
  const json::object context = parse_object(submission.context);
  for (const std::int64_t i : integers(Fields(context).get("matrices"), "matrices", 0, batch.num_datums() - 1)) {
    shapes[static_cast<std::size_t>(i)].k = batch.target_width[static_cast<std::size_t>(i)];
  }
  return Result{"application/x-protobuf", encode_forward_backward(answer<worker_protocol::TrainResult>(done), shapes)};
}

Outcome stepped(const std::string&, const Submission&, const DoneBody& done) {
  return Result{"application/json", encode_optim_step(answer<worker_protocol::OptimResult>(done))};
}

Outcome sampled(const std::string&, const Submission& submission, const DoneBody& done) {
  const json::object context = parse_object(submission.context);
  return Result{"application/x-protobuf",
                encode_sample(answer<worker_protocol::SampleResult>(done), work_of<worker_protocol::Sample>(submission),
                              Fields(context).boolean("sparse_targets", false))};
}

sessions::Model model_of(Context& context, const Submission& submission) {
  if (auto model = context.sessions.find_model(submission.model_id)) return *std::move(model);
  throw server_error("model \"" + submission.model_id + "\" is gone");
}

awaitable<Outcome> commit(Context& context, checkpoints::Checkpoint checkpoint, bool overwrite) {
  const bool for_sampler = checkpoint.path.kind == checkpoints::Kind::sampler_weights;
  const checkpoints::Checkpoint made = co_await context.checkpoints.commit(std::move(checkpoint), overwrite);
  // The client refuses another operation's type.
  co_return json_result(
      {{"path", made.path.str()}, {"type", for_sampler ? "save_weights_for_sampler" : "save_weights"}});
}

awaitable<Outcome> saved(Context& context, const Submission& submission, const DoneBody& done) {
  const SavedContext from = SavedContext::parse(submission.context);
  const sessions::Model model = model_of(context, submission);
  checkpoints::Checkpoint checkpoint;
  checkpoint.path = from.path;
  checkpoint.created_at = checkpoints::Clock::now();
  if (from.ttl_seconds) checkpoint.expires_at = checkpoint.created_at + std::chrono::seconds(*from.ttl_seconds);
  checkpoint.size_bytes = answer<worker_protocol::SaveResult>(done).bytes;
  checkpoint.user_metadata = from.user_metadata;
  checkpoint.base_model = model.base_model;
  checkpoint.base_dir = model.base_dir;
  checkpoint.lora = model.lora;
  checkpoint.request_id = from.key;
  return commit(context, std::move(checkpoint), from.overwrite);
}

Outcome published(Context& context, const Submission& submission) {
  const auto& work = work_of<worker_protocol::PublishVersion>(submission);
  const sessions::Model model = model_of(context, submission);
  const auto session = context.sessions.find_session(model.session_id);
  if (!session || session->state != sessions::SessionState::active) {
    sweep_versions(context);
    throw user_error("session \"" + model.session_id + "\" is over");
  }
  sessions::Sampler sampler;
  sampler.id = work.version;
  sampler.session_id = model.session_id;
  sampler.base_model = model.base_model;
  sampler.base_dir = model.base_dir;
  sampler.version = work.version;
  sampler.version_dir = context.checkpoints.relative(work.dir);
  const sessions::Sampler registered = context.sessions.create_sampler(std::move(sampler));
  if (registered.version != work.version) {
    throw user_error("sampling session \"" + work.version + "\" exists already");
  }
  return json_result({{"sampling_session_id", registered.id}, {"type", "save_weights_for_sampler"}});
}

}  // namespace

void set_completions(Context& context) {
  using futures::Operation;
  futures::Futures& futures = context.futures;
  futures.set_completion(Operation::create_model, created);
  futures.set_completion(Operation::load_weights, loaded);
  futures.set_completion(Operation::forward, trained);
  futures.set_completion(Operation::forward_backward, trained);
  futures.set_completion(Operation::optim_step, stepped);
  futures.set_completion(Operation::sample, sampled);
  futures.set_completion(Operation::save_weights,
                         [&context](const std::string&, const Submission& submission,
                                    const DoneBody& done) -> Completed { return saved(context, submission, done); });
  futures.set_completion(
      Operation::save_weights_for_sampler,
      [&context](const std::string&, const Submission& submission, const DoneBody& done) -> Completed {
        if (std::holds_alternative<worker_protocol::PublishVersion>(submission.work)) {
          return published(context, submission);
        }
        return saved(context, submission, done);
      });
}

}  // namespace ht::tinker_api
