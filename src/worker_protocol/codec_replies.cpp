#include "worker_protocol/codec.h"
#include "worker_protocol/codec_fields.h"

namespace ht::worker_protocol {
namespace {

template <typename Value, typename ProtoMap>
void put_map(ProtoMap& out, const std::map<std::string, Value>& in) {
  for (const auto& [key, value] : in) out[key] = value;
}
template <typename Value, typename ProtoMap>
void take_map(const ProtoMap& in, std::map<std::string, Value>& out) {
  for (const auto& [key, value] : in) out[key] = value;
}

void put(pb::WorkerInfo& out, const WorkerInfo& in) {
  out.set_max_seq_len(in.max_seq_len);
  out.set_device(in.device);
  out.set_memory_plan(in.memory_plan);
}
WorkerInfo take(const pb::WorkerInfo& in) {
  return {in.max_seq_len(), in.device(), in.memory_plan()};
}

void put(pb::TrainResult& out, const TrainResult& in) {
  put_array(out.mutable_logprobs(), in.logprobs);
  put_map(*out.mutable_metrics(), in.metrics);
  out.set_compute_seconds(in.compute_seconds);
}
TrainResult take(const pb::TrainResult& in) {
  TrainResult out;
  take_array(in.logprobs(), out.logprobs, "logprobs");
  take_map(in.metrics(), out.metrics);
  out.compute_seconds = in.compute_seconds();
  return out;
}

void put(pb::OptimResult& out, const OptimResult& in) {
  put_map(*out.mutable_metrics(), in.metrics);
  out.set_compute_seconds(in.compute_seconds);
}
OptimResult take(const pb::OptimResult& in) {
  OptimResult out;
  take_map(in.metrics(), out.metrics);
  out.compute_seconds = in.compute_seconds();
  return out;
}

void put(pb::TopkLogprobs& out, const TopkLogprobs& in) {
  out.set_k(in.k);
  put_array(out.mutable_token_ids(), in.token_ids);
  put_array(out.mutable_logprobs(), in.logprobs);
}
TopkLogprobs take(const pb::TopkLogprobs& in) {
  TopkLogprobs out;
  out.k = in.k();
  take_array(in.token_ids(), out.token_ids, "token_ids");
  take_array(in.logprobs(), out.logprobs, "logprobs");
  return out;
}

void put(pb::SampledSequence& out, const SampledSequence& in) {
  out.set_stop_reason(static_cast<int>(in.stop_reason));
  put_array(out.mutable_tokens(), in.tokens);
  put_array(out.mutable_logprobs(), in.logprobs);
  if (in.topk.k != 0) put(*out.mutable_topk(), in.topk);
}
SampledSequence take(const pb::SampledSequence& in) {
  SampledSequence out;
  out.stop_reason = take_enum(in.stop_reason(), StopReason::stop, StopReason::length, "stop_reason");
  take_array(in.tokens(), out.tokens, "tokens");
  take_array(in.logprobs(), out.logprobs, "logprobs");
  out.topk = take(in.topk());
  return out;
}

void put(pb::SampleResult& out, const SampleResult& in) {
  for (const SampledSequence& sequence : in.sequences) put(*out.add_sequences(), sequence);
  put_array(out.mutable_prompt_logprobs(), in.prompt_logprobs);
  if (in.topk_prompt.k != 0) put(*out.mutable_topk_prompt(), in.topk_prompt);
  put_array(out.mutable_target_prompt_logprobs(), in.target_prompt_logprobs);
  put_array(out.mutable_prompt_alt_tokens(), in.prompt_alt_tokens);
  put_array(out.mutable_prompt_alt_logprobs(), in.prompt_alt_logprobs);
  out.set_prompt_cache_hit_tokens(in.prompt_cache_hit_tokens);
}
SampleResult take(const pb::SampleResult& in) {
  SampleResult out;
  out.sequences.reserve(static_cast<std::size_t>(in.sequences_size()));
  for (const pb::SampledSequence& sequence : in.sequences()) out.sequences.push_back(take(sequence));
  take_array(in.prompt_logprobs(), out.prompt_logprobs, "prompt_logprobs");
  out.topk_prompt = take(in.topk_prompt());
  take_array(in.target_prompt_logprobs(), out.target_prompt_logprobs, "target_prompt_logprobs");
  take_array(in.prompt_alt_tokens(), out.prompt_alt_tokens, "prompt_alt_tokens");
  take_array(in.prompt_alt_logprobs(), out.prompt_alt_logprobs, "prompt_alt_logprobs");
  out.prompt_cache_hit_tokens = in.prompt_cache_hit_tokens();
  return out;
}

void put(pb::SnapshotResult& out, const SnapshotResult& in) {
  put_map(*out.mutable_last_request(), in.last_request);
  for (const std::string& version : in.versions_on_disk) out.add_versions_on_disk(version);
}
SnapshotResult take(const pb::SnapshotResult& in) {
  SnapshotResult out;
  take_map(in.last_request(), out.last_request);
  out.versions_on_disk.assign(in.versions_on_disk().begin(), in.versions_on_disk().end());
  return out;
}

void put(pb::StatusResult& out, const StatusResult& in) {
  out.set_queued_training(in.queued_training);
  out.set_running_sequences(in.running_sequences);
  out.set_waiting_sequences(in.waiting_sequences);
  out.set_cache_blocks_total(in.cache_blocks_total);
  out.set_cache_blocks_free(in.cache_blocks_free);
  out.set_micro_batches(in.micro_batches);
  out.set_decode_steps(in.decode_steps);
  out.set_rss_bytes(in.rss_bytes);
  out.set_peak_rss_bytes(in.peak_rss_bytes);
  out.set_trained_tokens(in.trained_tokens);
  out.set_sampled_tokens(in.sampled_tokens);
  out.set_preemptions(in.preemptions);
  out.set_adapter_bytes(in.adapter_bytes);
  out.set_adapter_bytes_limit(in.adapter_bytes_limit);
  out.set_version_bytes(in.version_bytes);
}
StatusResult take(const pb::StatusResult& in) {
  return {.queued_training = in.queued_training(),
          .running_sequences = in.running_sequences(),
          .waiting_sequences = in.waiting_sequences(),
          .cache_blocks_total = in.cache_blocks_total(),
          .cache_blocks_free = in.cache_blocks_free(),
          .micro_batches = in.micro_batches(),
          .decode_steps = in.decode_steps(),
          .rss_bytes = in.rss_bytes(),
          .peak_rss_bytes = in.peak_rss_bytes(),
          .trained_tokens = in.trained_tokens(),
          .sampled_tokens = in.sampled_tokens(),
          .preemptions = in.preemptions(),
          .adapter_bytes = in.adapter_bytes(),
          .adapter_bytes_limit = in.adapter_bytes_limit(),
          .version_bytes = in.version_bytes()};
}

struct PutDone {
  pb::Done& out;
  void operator()(const Ack&) const { out.mutable_ack(); }
  void operator()(const WorkerInfo& in) const { put(*out.mutable_worker_info(), in); }
  void operator()(const TrainResult& in) const { put(*out.mutable_train(), in); }
  void operator()(const OptimResult& in) const { put(*out.mutable_optim(), in); }
  void operator()(const SaveResult& in) const { out.mutable_save()->set_bytes(in.bytes); }
  void operator()(const SampleResult& in) const { put(*out.mutable_sample(), in); }
  void operator()(const SnapshotResult& in) const { put(*out.mutable_snapshot(), in); }
  void operator()(const StatusResult& in) const { put(*out.mutable_status(), in); }
};

DoneBody take_done(const pb::Done& in) {
  switch (in.body_case()) {
    case pb::Done::kAck:
      return Ack{};
    case pb::Done::kWorkerInfo:
      return take(in.worker_info());
    case pb::Done::kTrain:
      return take(in.train());
    case pb::Done::kOptim:
      return take(in.optim());
    case pb::Done::kSave:
      return SaveResult{in.save().bytes()};
    case pb::Done::kSample:
      return take(in.sample());
    case pb::Done::kSnapshot:
      return take(in.snapshot());
    case pb::Done::kStatus:
      return take(in.status());
    case pb::Done::BODY_NOT_SET:
      break;
  }
  throw server_error("a worker's Done has no body");
}

struct PutReply {
  pb::Reply& out;
  void operator()(const Done& in) const { std::visit(PutDone{*out.mutable_done()}, in.body); }
  void operator()(const Failure& in) const {
    out.mutable_failure()->set_category(static_cast<int>(in.category));
    out.mutable_failure()->set_message(in.message);
  }
  void operator()(const Progress& in) const {
    out.mutable_progress()->set_fraction(in.fraction);
    out.mutable_progress()->set_text(in.text);
  }
  void operator()(const MicroBatchExecuted& in) const {
    worker_protocol::put(*out.mutable_micro_batch_executed(), in.micro_batch);
  }
};

}  // namespace

std::string encode(const Reply& reply) {
  pb::Reply message;
  message.set_id(reply.id);
  std::visit(PutReply{message}, reply.body);
  return to_bytes(message, "worker reply");
}

Reply decode_reply(std::string_view bytes) {
  const auto in = from_bytes<pb::Reply>(bytes, "worker reply");
  switch (in.body_case()) {
    case pb::Reply::kDone:
      return {in.id(), Done{take_done(in.done())}};
    case pb::Reply::kFailure:
      return {in.id(),
              Failure{take_enum(in.failure().category(), ErrorCategory::user, ErrorCategory::unknown, "category"),
                      in.failure().message()}};
    case pb::Reply::kProgress:
      return {in.id(), Progress{in.progress().fraction(), in.progress().text()}};
    case pb::Reply::kMicroBatchExecuted:
      return {in.id(), MicroBatchExecuted{worker_protocol::take(in.micro_batch_executed())}};
    case pb::Reply::BODY_NOT_SET:
      break;
  }
  throw server_error("a worker reply has no body");
}

}  // namespace ht::worker_protocol
