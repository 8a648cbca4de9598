// How a worker gets its base model, and what that is made of.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <filesystem>
#include <thread>

#include "base/error.h"
#include "engine/device/cuda_library.h"
#include "worker/backend_config.h"
#include "worker/log.h"
#include "worker/worker.h"

namespace ht::worker {

namespace wp = worker_protocol;

// A table that cannot be read is none: nobody shall wait for it.
void Worker::set_token_table(const std::string& path) {
  token_table_ = nullptr;
  const auto tell_sampler = [this] {
    if (sampler_) sampler_->set_token_table(*token_table_);
  };
  try {
    if (!path.empty()) token_table_ = std::make_shared<const TokenTable>(TokenTable::read(path));
  } catch (...) {
    tell_sampler();
    throw;
  }
  tell_sampler();
}

wp::WorkerInfo Worker::initialize(wp::RequestId id, const wp::Initialize& request) {
  if (model_) throw server_error("the worker has a model already");
  const BackendConfig config = parse_backend_config(request.backend_config);
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  if (request.threads < 0 || request.threads > 4096) {
    throw user_error("threads is " + std::to_string(request.threads) + ", allowed are 0 (all cores) to 4096");
  }
  engine::EngineOptions options;
  options.threads = request.threads > 0 ? request.threads : cores;
  options.recompute = config.recompute;
  std::string note;
  options.device = &engine::choose_device(config.device, note);
  if (!note.empty()) log_warning(note);
  at::set_num_threads(options.threads);
  auto model = engine::BaseModel::load(request.model_dir, options, [&](double fraction, const std::string& text) {
    control_.send({id, wp::Progress{fraction, text}});
  });
  const model_spec::ModelSpec& spec = model->spec();
  if (request.max_seq_len < 0 || request.max_seq_len > spec.max_position_embeddings) {
    throw user_error("max_seq_len is " + std::to_string(request.max_seq_len) + ", the model allows 1 to " +
                     std::to_string(spec.max_position_embeddings));
  }
  wp::WorkerInfo info;
  info.max_seq_len = request.max_seq_len > 0 ? request.max_seq_len : spec.max_position_embeddings;
  const model_spec::MemoryPlan plan =
      plan_memory(spec, config, info.max_seq_len, model->has_16_bit_copy(), model->device().memory().free);
  info.memory_plan = plan.to_text();
  info.memory_plan.pop_back();  // the last line's end
  info.device = model->device().name();

  std::string name = std::filesystem::path(request.model_dir).lexically_normal().string();
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  auto versions = std::make_unique<Versions>(spec, name, plan.demand.version_bytes, files_);
  auto trainer = std::make_unique<TrainExecutor>(
      *model, *versions, files_,
      TrainOptions{config.micro_batch_tokens, info.max_seq_len, name, plan.adapters, plan.file_copies},
      [this](const wp::Reply& reply) { training_.send(reply); });
  counters_.adapter_bytes_limit = plan.adapters;
  SampleOptions sampling;
  sampling.limits = {static_cast<std::int32_t>(plan.demand.cache_tokens / kBlockSize), kBlockSize,
                     config.max_sampling_sequences, config.prefill_chunk_tokens};
  sampling.max_seq_len = info.max_seq_len;
  auto sampler = std::make_unique<SampleExecutor>(*model, *versions, sampling,
                                                  [this](const wp::Reply& reply) { sampling_.send(reply); });
  if (token_table_) sampler->set_token_table(*token_table_);
  turns_.emplace(config.sampling_share);
  model_ = std::move(model);
  versions_ = std::move(versions);
  trainer_ = std::move(trainer);
  sampler_ = std::move(sampler);
  publish_counters();
  return info;
}

}  // namespace ht::worker
