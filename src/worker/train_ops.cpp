// The ops of the training lane beside micro-batches, and snapshots.

#include <ATen/ATen.h>

#include <chrono>
#include <filesystem>

#include "base/error.h"
#include "worker/snapshot.h"
#include "worker/train_executor.h"

namespace ht::worker {

namespace wp = worker_protocol;

engine::Adapter& TrainExecutor::adapter(const std::string& name) {
  const auto found = adapters_.find(name);
  if (found == adapters_.end()) throw user_error("no adapter " + name + " in this worker");
  return found->second;
}

wp::DoneBody TrainExecutor::create(const wp::CreateAdapter& request) {
  if (adapters_.contains(request.adapter)) throw server_error("adapter " + request.adapter + " exists already");
  engine::Adapter created = engine::Adapter::create(model_.spec(), request.lora);
  if (!request.load_dir.empty()) load(created, request.load_dir, request.load_optimizer);
  adapters_.emplace(request.adapter, std::move(created));
  queue_.set_live(request.adapter, true);
  return wp::Ack{};
}

wp::DoneBody TrainExecutor::step(const wp::OptimStep& request) {
  const auto start = std::chrono::steady_clock::now();
  wp::OptimResult result;
  result.metrics = trainer_.optim_step(adapter(request.adapter), request.adam);
  result.compute_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

wp::DoneBody TrainExecutor::save(const wp::SaveAdapter& request) {
  const engine::Adapter& saved = adapter(request.adapter);
  wp::SaveResult result;
  result.bytes = engine::save_adapter_weights(saved.weights, options_.base_model, request.dir);
  if (request.with_optimizer) result.bytes += engine::save_optimizer(saved, request.dir);
  return result;
}

void TrainExecutor::load(engine::Adapter& target, const std::string& dir, bool with_optimizer) {
  const model_spec::LoraConfig stored = engine::read_lora_config(dir);
  const model_spec::LoraConfig& config = target.weights.layout->config();
  const auto shape = [](const model_spec::LoraConfig& lora) {
    return "rank " + std::to_string(lora.rank) + ", attn " + (lora.train_attn ? "on" : "off") + ", mlp " +
           (lora.train_mlp ? "on" : "off") + ", unembed " + (lora.train_unembed ? "on" : "off");
  };
  if (shape(stored) != shape(config)) {
    throw user_error("the checkpoint " + dir + " holds an adapter with " + shape(stored) + ", this model has " +
                     shape(config));
  }
  const engine::AdapterWeights weights = engine::load_adapter_weights(model_.spec(), dir);
  engine::Adapter moments = target;
  moments.exp_avg = at::zeros_like(target.exp_avg);
  moments.exp_avg_sq = at::zeros_like(target.exp_avg_sq);
  moments.step = 0;
  if (with_optimizer) engine::load_optimizer(moments, dir);
  // Nothing is changed before everything is read.
  target.weights.flat.copy_(weights.flat);
  target.exp_avg = moments.exp_avg;
  target.exp_avg_sq = moments.exp_avg_sq;
  target.step = moments.step;
  target.grad.zero_();
}

wp::SnapshotResult TrainExecutor::snapshot(const std::string& dir) {
  wp::SnapshotResult result;
  SnapshotManifest manifest;
  manifest.next_micro_batch = queue_.next_number();
  for (const auto& [name, saved] : adapters_) {
    const std::string file = "adapter-" + std::to_string(manifest.adapters.size()) + ".safetensors";
    engine::save_adapter_state(saved, std::filesystem::path(dir) / file);
    manifest.adapters.push_back({name, file, last_request_[name]});
  }
  // A version can be made again only as long as the requests before it are kept: its files come before the cut counts.
  versions_.finish_files();
  for (const Versions::OnDisk& version : versions_.on_disk()) {
    manifest.versions.push_back({version.version, version.dir});
    result.versions_on_disk.push_back(version.version);
  }
  write_manifest(manifest, dir);
  result.last_request = last_request_;
  return result;
}

void TrainExecutor::restore(const std::string& dir) {
  if (!adapters_.empty() || queue_.size() > 0) throw server_error("a snapshot is restored before anything else runs");
  const SnapshotManifest manifest = read_manifest(dir);
  std::map<std::string, engine::Adapter> restored;
  for (const auto& entry : manifest.adapters) {
    restored.emplace(entry.adapter,
                     engine::load_adapter_state(model_.spec(), std::filesystem::path(dir) / entry.file));
  }
  adapters_ = std::move(restored);
  for (const auto& entry : manifest.adapters) {
    queue_.set_live(entry.adapter, true);
    last_request_[entry.adapter] = entry.last_request;
  }
  for (const auto& version : manifest.versions) versions_.restore(version.version, version.dir);
  queue_.set_next_number(manifest.next_micro_batch);
}

}  // namespace ht::worker
