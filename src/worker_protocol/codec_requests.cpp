#include "worker_protocol/codec.h"
#include "worker_protocol/codec_fields.h"

namespace ht::worker_protocol {
namespace {

void put(pb::CreateAdapter& out, const CreateAdapter& in) {
  out.set_adapter(in.adapter);
  pb::LoraConfig& lora = *out.mutable_lora();
  lora.set_rank(in.lora.rank);
  lora.set_seed(in.lora.seed);
  lora.set_train_attn(in.lora.train_attn);
  lora.set_train_mlp(in.lora.train_mlp);
  lora.set_train_unembed(in.lora.train_unembed);
  out.set_load_dir(in.load_dir);
  out.set_load_optimizer(in.load_optimizer);
}
CreateAdapter take(const pb::CreateAdapter& in) {
  return {.adapter = in.adapter(),
          .lora = {.rank = in.lora().rank(),
                   .seed = in.lora().seed(),
                   .train_attn = in.lora().train_attn(),
                   .train_mlp = in.lora().train_mlp(),
                   .train_unembed = in.lora().train_unembed()},
          .load_dir = in.load_dir(),
          .load_optimizer = in.load_optimizer()};
}

void put(pb::DropAdapter& out, const DropAdapter& in) {
  out.set_adapter(in.adapter);
}
DropAdapter take(const pb::DropAdapter& in) {
  return {in.adapter()};
}

void put(pb::TrainBatch& out, const TrainBatch& in) {
  put_array(out.mutable_tokens(), in.tokens);
  put_array(out.mutable_cu_seqlens(), in.cu_seqlens);
  put_array(out.mutable_target_width(), in.target_width);
  put_array(out.mutable_targets(), in.targets);
  put_array(out.mutable_weights(), in.weights);
  put_array(out.mutable_logprobs(), in.logprobs);
  put_array(out.mutable_advantages(), in.advantages);
  put_array(out.mutable_sequence_ratio_mask(), in.sequence_ratio_mask);
  put_array(out.mutable_clip_low_threshold(), in.clip_low_threshold);
  put_array(out.mutable_clip_high_threshold(), in.clip_high_threshold);
}
TrainBatch take(const pb::TrainBatch& in) {
  TrainBatch out;
  take_array(in.tokens(), out.tokens, "tokens");
  take_array(in.cu_seqlens(), out.cu_seqlens, "cu_seqlens");
  take_array(in.target_width(), out.target_width, "target_width");
  take_array(in.targets(), out.targets, "targets");
  take_array(in.weights(), out.weights, "weights");
  take_array(in.logprobs(), out.logprobs, "logprobs");
  take_array(in.advantages(), out.advantages, "advantages");
  take_array(in.sequence_ratio_mask(), out.sequence_ratio_mask, "sequence_ratio_mask");
  take_array(in.clip_low_threshold(), out.clip_low_threshold, "clip_low_threshold");
  take_array(in.clip_high_threshold(), out.clip_high_threshold, "clip_high_threshold");
  return out;
}

void put(pb::ForwardBackward& out, const ForwardBackward& in) {
  out.set_adapter(in.adapter);
  put(*out.mutable_batch(), in.batch);
  out.set_loss(static_cast<int>(in.loss));
  pb::LossConfig& config = *out.mutable_config();
  config.set_clip_low_threshold(in.config.clip_low_threshold);
  config.set_clip_high_threshold(in.config.clip_high_threshold);
  config.set_beta(in.config.beta);
  config.set_ratio_max(in.config.ratio_max);
  out.set_forward_only(in.forward_only);
}
ForwardBackward take(const pb::ForwardBackward& in) {
  return {.adapter = in.adapter(),
          .batch = take(in.batch()),
          .loss = take_enum(in.loss(), LossKind::cross_entropy, LossKind::stable_reinforce, "loss"),
          .config = {.clip_low_threshold = in.config().clip_low_threshold(),
                     .clip_high_threshold = in.config().clip_high_threshold(),
                     .beta = in.config().beta(),
                     .ratio_max = in.config().ratio_max()},
          .forward_only = in.forward_only()};
}

void put(pb::OptimStep& out, const OptimStep& in) {
  out.set_adapter(in.adapter);
  out.set_learning_rate(in.adam.learning_rate);
  out.set_beta1(in.adam.beta1);
  out.set_beta2(in.adam.beta2);
  out.set_eps(in.adam.eps);
  out.set_weight_decay(in.adam.weight_decay);
  out.set_grad_clip_norm(in.adam.grad_clip_norm);
}
OptimStep take(const pb::OptimStep& in) {
  return {.adapter = in.adapter(),
          .adam = {.learning_rate = in.learning_rate(),
                   .beta1 = in.beta1(),
                   .beta2 = in.beta2(),
                   .eps = in.eps(),
                   .weight_decay = in.weight_decay(),
                   .grad_clip_norm = in.grad_clip_norm()}};
}

void put(pb::SaveAdapter& out, const SaveAdapter& in) {
  out.set_adapter(in.adapter);
  out.set_dir(in.dir);
  out.set_with_optimizer(in.with_optimizer);
}
SaveAdapter take(const pb::SaveAdapter& in) {
  return {in.adapter(), in.dir(), in.with_optimizer()};
}

void put(pb::LoadAdapter& out, const LoadAdapter& in) {
  out.set_adapter(in.adapter);
  out.set_dir(in.dir);
  out.set_load_optimizer(in.load_optimizer);
}
LoadAdapter take(const pb::LoadAdapter& in) {
  return {in.adapter(), in.dir(), in.load_optimizer()};
}

void put(pb::PublishVersion& out, const PublishVersion& in) {
  out.set_adapter(in.adapter);
  out.set_version(in.version);
  out.set_dir(in.dir);
}
PublishVersion take(const pb::PublishVersion& in) {
  return {in.adapter(), in.version(), in.dir()};
}

void put(pb::Replay& out, const Replay& in) {
  for (const MicroBatch& micro_batch : in.micro_batches) worker_protocol::put(*out.add_micro_batches(), micro_batch);
}
Replay take(const pb::Replay& in) {
  Replay out;
  out.micro_batches.reserve(static_cast<std::size_t>(in.micro_batches_size()));
  for (const pb::MicroBatch& micro_batch : in.micro_batches()) {
    out.micro_batches.push_back(worker_protocol::take(micro_batch));
  }
  return out;
}

void put(pb::Sample& out, const Sample& in) {
  out.set_version(in.version);
  out.set_version_dir(in.version_dir);
  put_array(out.mutable_prompt(), in.prompt);
  out.set_num_samples(in.num_samples);
  pb::SamplingParams& params = *out.mutable_params();
  params.set_max_tokens(in.params.max_tokens);
  params.set_seed(in.params.seed);
  params.set_temperature(in.params.temperature);
  params.set_top_k(in.params.top_k);
  params.set_top_p(in.params.top_p);
  params.set_stop_on_eos(in.params.stop_on_eos);
  put_array(params.mutable_stop_tokens(), in.params.stop_tokens);
  for (const std::string& text : in.params.stop_strings) params.add_stop_strings(text);
  out.set_prompt_logprobs(in.prompt_logprobs);
  out.set_prompt_logprobs_last_n(in.prompt_logprobs_last_n);
  out.set_topk_prompt_logprobs(in.topk_prompt_logprobs);
  out.set_topk_sample_logprobs(in.topk_sample_logprobs);
  out.set_target_width(in.target_width);
  put_array(out.mutable_prompt_targets(), in.prompt_targets);
  out.set_prompt_alt_tokens_k(in.prompt_alt_tokens_k);
  out.set_owner(in.owner);
}
Sample take(const pb::Sample& in) {
  Sample out;
  out.version = in.version();
  out.version_dir = in.version_dir();
  take_array(in.prompt(), out.prompt, "prompt");
  out.num_samples = in.num_samples();
  out.params.max_tokens = in.params().max_tokens();
  out.params.seed = in.params().seed();
  out.params.temperature = in.params().temperature();
  out.params.top_k = in.params().top_k();
  out.params.top_p = in.params().top_p();
  out.params.stop_on_eos = in.params().stop_on_eos();
  take_array(in.params().stop_tokens(), out.params.stop_tokens, "stop_tokens");
  out.params.stop_strings.assign(in.params().stop_strings().begin(), in.params().stop_strings().end());
  out.prompt_logprobs = in.prompt_logprobs();
  out.prompt_logprobs_last_n = in.prompt_logprobs_last_n();
  out.topk_prompt_logprobs = in.topk_prompt_logprobs();
  out.topk_sample_logprobs = in.topk_sample_logprobs();
  out.target_width = in.target_width();
  take_array(in.prompt_targets(), out.prompt_targets, "prompt_targets");
  out.prompt_alt_tokens_k = in.prompt_alt_tokens_k();
  out.owner = in.owner();
  return out;
}

void put(pb::DropVersion& out, const DropVersion& in) {
  out.set_version(in.version);
}
DropVersion take(const pb::DropVersion& in) {
  return {in.version()};
}

void put(pb::Initialize& out, const Initialize& in) {
  out.set_model_dir(in.model_dir);
  out.set_backend_config(in.backend_config);
  out.set_max_seq_len(in.max_seq_len);
  out.set_threads(in.threads);
}
Initialize take(const pb::Initialize& in) {
  return {in.model_dir(), in.backend_config(), in.max_seq_len(), in.threads()};
}

void put(pb::SetTokenTable& out, const SetTokenTable& in) {
  out.set_path(in.path);
}
SetTokenTable take(const pb::SetTokenTable& in) {
  return {in.path()};
}
void put(pb::Cancel& out, const Cancel& in) {
  out.set_target(in.target);
}
Cancel take(const pb::Cancel& in) {
  return {in.target()};
}
void put(pb::Snapshot& out, const Snapshot& in) {
  out.set_dir(in.dir);
}
Snapshot take(const pb::Snapshot& in) {
  return {in.dir()};
}
void put(pb::Restore& out, const Restore& in) {
  out.set_dir(in.dir);
}
Restore take(const pb::Restore& in) {
  return {in.dir()};
}

struct PutBody {
  pb::Request& out;
  void operator()(const CreateAdapter& in) const { put(*out.mutable_create_adapter(), in); }
  void operator()(const DropAdapter& in) const { put(*out.mutable_drop_adapter(), in); }
  void operator()(const ForwardBackward& in) const { put(*out.mutable_forward_backward(), in); }
  void operator()(const OptimStep& in) const { put(*out.mutable_optim_step(), in); }
  void operator()(const SaveAdapter& in) const { put(*out.mutable_save_adapter(), in); }
  void operator()(const LoadAdapter& in) const { put(*out.mutable_load_adapter(), in); }
  void operator()(const PublishVersion& in) const { put(*out.mutable_publish_version(), in); }
  void operator()(const Replay& in) const { put(*out.mutable_replay(), in); }
  void operator()(const Sample& in) const { put(*out.mutable_sample(), in); }
  void operator()(const DropVersion& in) const { put(*out.mutable_drop_version(), in); }
  void operator()(const Initialize& in) const { put(*out.mutable_initialize(), in); }
  void operator()(const SetTokenTable& in) const { put(*out.mutable_set_token_table(), in); }
  void operator()(const Cancel& in) const { put(*out.mutable_cancel(), in); }
  void operator()(const Snapshot& in) const { put(*out.mutable_snapshot(), in); }
  void operator()(const Restore& in) const { put(*out.mutable_restore(), in); }
  void operator()(const Status&) const { out.mutable_status(); }
  void operator()(const Shutdown&) const { out.mutable_shutdown(); }
};

RequestBody take_body(const pb::Request& in) {
  switch (in.body_case()) {
    case pb::Request::kCreateAdapter:
      return take(in.create_adapter());
    case pb::Request::kDropAdapter:
      return take(in.drop_adapter());
    case pb::Request::kForwardBackward:
      return take(in.forward_backward());
    case pb::Request::kOptimStep:
      return take(in.optim_step());
    case pb::Request::kSaveAdapter:
      return take(in.save_adapter());
    case pb::Request::kLoadAdapter:
      return take(in.load_adapter());
    case pb::Request::kPublishVersion:
      return take(in.publish_version());
    case pb::Request::kReplay:
      return take(in.replay());
    case pb::Request::kSample:
      return take(in.sample());
    case pb::Request::kDropVersion:
      return take(in.drop_version());
    case pb::Request::kInitialize:
      return take(in.initialize());
    case pb::Request::kSetTokenTable:
      return take(in.set_token_table());
    case pb::Request::kCancel:
      return take(in.cancel());
    case pb::Request::kSnapshot:
      return take(in.snapshot());
    case pb::Request::kRestore:
      return take(in.restore());
    case pb::Request::kStatus:
      return Status{};
    case pb::Request::kShutdown:
      return Shutdown{};
    case pb::Request::BODY_NOT_SET:
      break;
  }
  throw server_error("a worker request has no body");
}

struct LaneOf {
  template <typename Training>
  Lane operator()(const Training&) const {
    return Lane::training;
  }
  Lane operator()(const Sample&) const { return Lane::sampling; }
  Lane operator()(const DropVersion&) const { return Lane::sampling; }
  Lane operator()(const Initialize&) const { return Lane::control; }
  Lane operator()(const SetTokenTable&) const { return Lane::control; }
  Lane operator()(const Cancel&) const { return Lane::control; }
  Lane operator()(const Snapshot&) const { return Lane::control; }
  Lane operator()(const Restore&) const { return Lane::control; }
  Lane operator()(const Status&) const { return Lane::control; }
  Lane operator()(const Shutdown&) const { return Lane::control; }
};

}  // namespace

Lane lane_of(const RequestBody& body) {
  return std::visit(LaneOf{}, body);
}

std::string encode(const Request& request) {
  pb::Request message;
  message.set_id(request.id);
  std::visit(PutBody{message}, request.body);
  return to_bytes(message, "worker request");
}

Request decode_request(std::string_view bytes) {
  const auto message = from_bytes<pb::Request>(bytes, "worker request");
  return {message.id(), take_body(message)};
}

}  // namespace ht::worker_protocol
