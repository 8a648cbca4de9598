// save_weights, save_weights_for_sampler, load_weights, weights_info.

#include "server/tinker_api/create_model.h"
#include "server/tinker_api/lora_request.h"
#include "server/tinker_api/numbered.h"
#include "server/tinker_api/saved_context.h"

namespace ht::tinker_api {
namespace {

using checkpoints::Kind;

std::optional<std::int64_t> decode_ttl(const Fields& fields) {
  if (!fields.find("ttl_seconds")) return std::nullopt;
  return fields.bounded("ttl_seconds", 0, kMinTtlSeconds, kMaxTtlSeconds);
}

// Names the attempt to save, the same for every repetition of the request.
std::string save_key(const Numbered& own) {
  return own.model.id + "." + std::to_string(own.submission.seq_id);
}

void build_save(Context& context, Numbered& own, const Fields& fields, Kind kind) {
  SavedContext saved;
  saved.path = {own.model.id, kind, fields.text("path")};
  checkpoints::check_name(saved.path.name);
  saved.key = save_key(own);
  saved.ttl_seconds = decode_ttl(fields);
  saved.overwrite = kind == Kind::weights && fields.boolean("overwrite", false);
  saved.user_metadata = fields.text_map("user_metadata");
  // Sent again after its end: the first answer stands, and nobody would clear another staging directory away.
  const auto there = context.checkpoints.find(saved.path);
  if (there && there->request_id == saved.key)
    throw user_error(saved.path.str() + " was saved by this request already");
  context.checkpoints.check_free(saved.path, saved.overwrite, saved.key);
  own.submission.context = saved.serialize();
  own.submission.work =
      worker_protocol::SaveAdapter{own.model.id, context.checkpoints.stage(saved.key).string(), kind == Kind::weights};
}

void build_ephemeral(Context& context, Numbered& own, const Fields& fields) {
  const std::int64_t number = fields.bounded("sampling_session_seq_id", -1, 0, INT64_MAX);
  if (number < 0) throw user_error("save_weights_for_sampler needs a path or a sampling_session_seq_id");
  const std::string id = own.model.session_id + ":sample:" + std::to_string(number);
  if (context.sessions.find_sampler(id)) throw user_error("sampling session \"" + id + "\" exists already");
  own.submission.context = "{}";
  own.submission.work = worker_protocol::PublishVersion{own.model.id, id, context.checkpoints.version_dir(id).string()};
}

http::Response save_weights(Context& context, const http::Request& request) {
  return numbered_json(context, request, futures::Operation::save_weights,
                       [&](Numbered& own, const Fields& fields) { build_save(context, own, fields, Kind::weights); });
}

http::Response save_weights_for_sampler(Context& context, const http::Request& request) {
  return numbered_json(context, request, futures::Operation::save_weights_for_sampler,
                       [&](Numbered& own, const Fields& fields) {
                         const std::string kind = fields.optional_text("kind").value_or("snapshot");
                         // In flight, a sampler may run with its own save's weights or newer ones: its own are enough.
                         if (kind != "snapshot" && kind != "inflight") {
                           throw user_error("kind = \"" + kind + "\"; allowed: snapshot, inflight");
                         }
                         if (fields.find("path")) {
                           build_save(context, own, fields, Kind::sampler_weights);
                         } else {
                           build_ephemeral(context, own, fields);
                         }
                       });
}

checkpoints::Checkpoint loadable(Context& context, const Fields& fields, bool with_optimizer) {
  const std::string path = fields.text("path");
  const checkpoints::Checkpoint checkpoint = known_checkpoint(context, path);
  if (with_optimizer && checkpoint.path.kind != Kind::weights) {
    throw user_error(path + " is a sampler checkpoint without optimizer state: load it with optimizer=false");
  }
  return checkpoint;
}

http::Response create_via_load(Context& context, const http::Request& request, const Fields& fields) {
  check_optimizer_config(fields);
  NewModel model;
  model.load_optimizer = fields.boolean("optimizer", false);
  const checkpoints::Checkpoint checkpoint = loadable(context, fields, model.load_optimizer);
  const std::string override_name = fields.optional_text("base_model").value_or("");
  model.base_model = override_name.empty() ? checkpoint.base_model : override_name;
  const ServedModel* own = context.catalogue.find_dir(checkpoint.base_dir);
  const ServedModel& served = override_name.empty() && own ? *own : context.catalogue.served(model.base_model);
  if (own && own->base_dir != served.base_dir) {
    throw user_error("base_model \"" + override_name + "\" does not fit " + checkpoint.path.str() +
                     ", which was trained on \"" + checkpoint.base_model + "\"");
  }
  model.base_dir = served.base_dir;
  model.lora = checkpoint.lora;
  model.path = checkpoint.path.str();
  model.load_dir = checkpoint.dir.string();
  return submit_new_model(context, request, fields, futures::Operation::load_weights, std::move(model));
}

void build_load(Context& context, Numbered& own, const Fields& fields) {
  const bool with_optimizer = fields.boolean("optimizer", false);
  const checkpoints::Checkpoint checkpoint = loadable(context, fields, with_optimizer);
  const model_spec::LoraConfig& have = own.model.lora;
  const model_spec::LoraConfig& want = checkpoint.lora;
  if (checkpoint.base_dir != own.model.base_dir) {
    throw user_error(checkpoint.path.str() + " was trained on \"" + checkpoint.base_model + "\", the model is on \"" +
                     own.model.base_model + "\"");
  }
  if (have.rank != want.rank) {
    throw user_error(checkpoint.path.str() + " has rank " + std::to_string(want.rank) + ", the model has rank " +
                     std::to_string(have.rank));
  }
  if (have.train_attn != want.train_attn || have.train_mlp != want.train_mlp ||
      have.train_unembed != want.train_unembed) {
    throw user_error(checkpoint.path.str() +
                     " trains other layers (train_attn, train_mlp, train_unembed) than the model");
  }
  own.submission.context = json::serialize(json::object{{"path", checkpoint.path.str()}});
  own.submission.work = worker_protocol::LoadAdapter{own.model.id, checkpoint.dir.string(), with_optimizer};
}

http::Response load_weights(Context& context, const http::Request& request) {
  const json::object body = parse_numbered_body(context, request);
  const Fields fields(body);
  if (!fields.find("model_id")) return create_via_load(context, request, fields);
  return numbered_json(context, request, futures::Operation::load_weights,
                       [&](Numbered& own, const Fields& own_fields) { build_load(context, own, own_fields); });
}

http::Response weights_info(Context& context, const http::Request& request) {
  const json::object body = parse_object(request.body);
  const checkpoints::Checkpoint checkpoint = known_checkpoint(context, Fields(body).text("tinker_path"));
  return json_response(json::object{{"base_model", checkpoint.base_model},
                                    {"is_lora", true},
                                    {"optimizer_config", json::object{{"type", "adamw"}}},
                                    {"lora_rank", checkpoint.lora.rank},
                                    {"train_unembed", checkpoint.lora.train_unembed},
                                    {"train_mlp", checkpoint.lora.train_mlp},
                                    {"train_attn", checkpoint.lora.train_attn}});
}

}  // namespace

void add_weights_routes(http::Router& router, Context& context) {
  add(router, context, "POST", "/save_weights", save_weights);
  add(router, context, "POST", "/save_weights_for_sampler", save_weights_for_sampler);
  add(router, context, "POST", "/load_weights", load_weights);
  add(router, context, "POST", "/weights_info", weights_info);
}

}  // namespace ht::tinker_api
