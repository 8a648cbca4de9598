// The ops of the training lane beside micro-batches, and snapshots.

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <utility>

#include "base/error.h"
#include "model_spec/memory_plan.h"
#include "worker/adapter_buffers.h"
#include "worker/snapshot.h"
#include "worker/train_executor.h"

namespace ht::worker {

namespace wp = worker_protocol;
using wp::RequestId;

namespace {

std::uint64_t bytes_of_buffers(const engine::Adapter& adapter) {
  return 4 * static_cast<std::uint64_t>(adapter.weights.flat.nbytes());
}

std::string shape(const model_spec::LoraConfig& lora) {
  return "rank " + std::to_string(lora.rank) + ", attn " + (lora.train_attn ? "on" : "off") + ", mlp " +
         (lora.train_mlp ? "on" : "off") + ", unembed " + (lora.train_unembed ? "on" : "off");
}

void check_shape(const model_spec::LoraConfig& stored, const model_spec::LoraConfig& wanted, const std::string& dir) {
  if (shape(stored) == shape(wanted)) return;
  throw user_error("the checkpoint " + dir + " holds an adapter with " + shape(stored) + ", this model has " +
                   shape(wanted));
}

Error error_of(const std::exception& exception) {
  const wp::Failure failure = failure_of(exception);
  return Error(failure.category, failure.message);
}

}  // namespace

engine::Adapter& TrainExecutor::adapter(const std::string& name) {
  const auto found = adapters_.find(name);
  if (found == adapters_.end()) throw user_error("no adapter " + name + " in this worker");
  return found->second;
}

void TrainExecutor::drop_adapter(const std::string& name) {
  const auto found = adapters_.find(name);
  if (found == adapters_.end()) return;
  adapter_bytes_ -= model_spec::adapter_bytes(model_.spec(), found->second.weights.layout->config());
  adapters_.erase(found);
  queue_.set_live(name, false);
}

std::optional<wp::DoneBody> TrainExecutor::create(RequestId id, const wp::CreateAdapter& request) {
  if (adapters_.contains(request.adapter)) throw server_error("adapter " + request.adapter + " exists already");
  const std::uint64_t bytes = model_spec::adapter_bytes(model_.spec(), request.lora);
  const std::uint64_t free = options_.adapter_bytes - std::min(options_.adapter_bytes, adapter_bytes_);
  if (bytes > free) {
    throw user_error("an adapter of rank " + std::to_string(request.lora.rank) + " takes " +
                     model_spec::size_text(bytes) + " (" + std::to_string(bytes) + " bytes), free are " +
                     model_spec::size_text(free) + " (" + std::to_string(free) + " bytes) of the " +
                     model_spec::size_text(options_.adapter_bytes) +
                     " for adapters in training: choose a lower rank, or end sessions that are not needed");
  }
  if (!request.load_dir.empty()) {
    adapter_bytes_ += bytes;
    read_adapter(id, request.adapter, request.load_dir, request.load_optimizer, bytes,
                 [this, lora = request.lora] { return engine::Adapter::create(model_.spec(), lora); });
    return std::nullopt;
  }
  adapters_.emplace(request.adapter, engine::Adapter::create(model_.spec(), request.lora, model_.device()));
  adapter_bytes_ += bytes;
  queue_.set_live(request.adapter, true);
  return wp::Ack{};
}

wp::DoneBody TrainExecutor::step(const wp::OptimStep& request) {
  const auto start = std::chrono::steady_clock::now();
  engine::Adapter& stepped = adapter(request.adapter);
  own(stepped);
  wp::OptimResult result;
  result.metrics = trainer_.optim_step(stepped, request.adam);
  result.compute_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

void TrainExecutor::write_adapter(const std::string& name, Write write, Written then) {
  const engine::Adapter& now = adapter(name);
  const std::uint64_t buffers = bytes_of_buffers(now);
  // Without memory for a copy the adapter must not change before its file is complete.
  const bool waits = buffers > options_.copy_bytes - std::min(options_.copy_bytes, copy_bytes_);
  if (waits) {
    queue_.hold(name);
  } else {
    copy_bytes_ += buffers;
  }
  files_.write([this, name, cut = now, buffers, waits, write = std::move(write),
                then = std::move(then)]() mutable -> FileThread::Then {
    std::uint64_t bytes = 0;
    std::optional<Error> error;
    try {
      bytes = write(cut);
    } catch (const std::exception& thrown) {
      error = error_of(thrown);
    }
    cut = {};
    return [this, name, buffers, waits, bytes, error, then = std::move(then)] {
      if (waits) {
        queue_.release(name);
      } else {
        copy_bytes_ -= buffers;
      }
      then(bytes, error ? &*error : nullptr);
    };
  });
}

// Its requests go on meanwhile: a save changes nothing. So this is its turn, and the reply comes later.
void TrainExecutor::save(RequestId id, const wp::SaveAdapter& request) {
  write_adapter(
      request.adapter,
      [this, request](const engine::Adapter& saved) {
        std::uint64_t bytes = engine::save_adapter_weights(saved.weights, options_.base_model, request.dir);
        if (request.with_optimizer) bytes += engine::save_optimizer(saved, request.dir);
        return bytes;
      },
      [this, id](std::uint64_t bytes, const Error* error) {
        if (error != nullptr) {
          send_({id, failure_of(*error)});
        } else {
          send_({id, wp::Done{wp::SaveResult{bytes}}});
        }
      });
  last_request_[request.adapter] = id;
}

std::optional<wp::DoneBody> TrainExecutor::publish(RequestId id, const wp::PublishVersion& request, bool again) {
  const engine::Adapter& published = adapter(request.adapter);
  if (versions_.has_room(static_cast<std::uint64_t>(published.weights.flat.nbytes()))) {
    versions_.publish(request.version, engine::freeze(published), request.dir);
    return wp::Ack{};
  }
  if (again) throw server_error("version " + request.version + " finds no room: the files of others cannot be written");
  // Once what is published has been written, or could not be.
  versions_.write_again();
  queue_.hold(request.adapter);
  files_.write([this, id, request]() -> FileThread::Then {
    return [this, id, request] {
      queue_.release(request.adapter);
      try {
        done(id, request.adapter, publish(id, request, true).value());
      } catch (const std::exception& error) {
        fail(id, request.adapter, error);
      }
    };
  });
  return std::nullopt;
}

void TrainExecutor::load(RequestId id, const wp::LoadAdapter& request) {
  read_adapter(id, request.adapter, request.dir, request.load_optimizer, 0,
               [weights = engine::AdapterWeights{adapter(request.adapter).weights.layout, {}}] {
                 engine::Adapter fresh;
                 fresh.weights = weights;
                 fresh.grad = at::zeros({weights.layout->numel()}, at::kFloat);
                 fresh.exp_avg = at::zeros_like(fresh.grad);
                 fresh.exp_avg_sq = at::zeros_like(fresh.grad);
                 return fresh;
               });
}

// Reads the checkpoint in `dir` into what `make` gives, both on the file thread, and makes that the adapter. Until then
// its requests wait, and it is as it was. `reserved`: of adapter_bytes_, given back if it fails.
void TrainExecutor::read_adapter(RequestId id, const std::string& name, const std::string& dir, bool with_optimizer,
                                 std::uint64_t reserved, std::function<engine::Adapter()> make) {
  queue_.hold(name);
  files_.read([this, id, name, dir, with_optimizer, reserved, make = std::move(make)]() -> FileThread::Then {
    std::optional<engine::Adapter> read;
    std::optional<Error> error;
    try {
      engine::Adapter fresh = make();
      check_shape(engine::read_lora_config(dir), fresh.weights.layout->config(), dir);
      fresh.weights.flat = engine::load_adapter_weights(model_.spec(), dir).flat;
      if (with_optimizer) engine::load_optimizer(fresh, dir);
      read = std::move(fresh);
    } catch (const std::exception& thrown) {
      error = error_of(thrown);
    }
    return [this, id, name, reserved, read = std::move(read), error]() mutable {
      queue_.release(name);
      if (error) {
        adapter_bytes_ -= reserved;
        return fail(id, name, *error);
      }
      engine::move_to(model_.device(), *read);
      adapters_[name] = std::move(*read);
      queue_.set_live(name, true);
      done(id, name, wp::Ack{});
    };
  });
}

void TrainExecutor::snapshot(const std::string& dir, std::function<void(SnapshotReply)> then) {
  struct Cut {
    SnapshotManifest manifest;
    wp::SnapshotResult result;
    std::optional<Error> error;
  };
  const auto cut = std::make_shared<Cut>();
  cut->manifest.next_micro_batch = queue_.next_number();
  cut->result.last_request = last_request_;
  for (const auto& [name, saved] : adapters_) {
    const std::string file = "adapter-" + std::to_string(cut->manifest.adapters.size()) + ".safetensors";
    cut->manifest.adapters.push_back({name, file, last_request_[name]});
    write_adapter(
        name,
        [path = std::filesystem::path(dir) / file](const engine::Adapter& adapter) -> std::uint64_t {
          engine::save_adapter_state(adapter, path);
          return 0;
        },
        [cut](std::uint64_t, const Error* error) {
          if (error != nullptr && !cut->error) cut->error = *error;
        });
  }
  // A version can be made again only as long as the requests before it are kept: its files come before the cut counts.
  versions_.write_again();
  const auto write_the_manifest = [this, cut, dir, then = std::move(then)] {
    if (cut->error) return then(failure_of(*cut->error));
    for (const Versions::OnDisk& version : versions_.on_disk()) {
      cut->manifest.versions.push_back({version.version, version.dir});
      cut->result.versions_on_disk.push_back(version.version);
    }
    files_.write([cut, dir, then]() -> FileThread::Then {
      try {
        write_manifest(cut->manifest, dir);
      } catch (const std::exception& error) {
        return [then, failure = failure_of(error)] { then(failure); };
      }
      return [then, cut] { then(wp::Done{cut->result}); };
    });
  };
  files_.write([write_the_manifest]() -> FileThread::Then { return write_the_manifest; });
}

void TrainExecutor::restore(const std::string& dir) {
  if (!adapters_.empty() || queue_.size() > 0) throw server_error("a snapshot is restored before anything else runs");
  const SnapshotManifest manifest = read_manifest(dir);
  std::map<std::string, engine::Adapter> restored;
  for (const auto& entry : manifest.adapters) {
    restored.emplace(entry.adapter, engine::load_adapter_state(model_.spec(), std::filesystem::path(dir) / entry.file,
                                                               model_.device()));
  }
  adapters_ = std::move(restored);
  for (const auto& [name, adapter] : adapters_) {
    adapter_bytes_ += model_spec::adapter_bytes(model_.spec(), adapter.weights.layout->config());
  }
  for (const auto& entry : manifest.adapters) {
    queue_.set_live(entry.adapter, true);
    last_request_[entry.adapter] = entry.last_request;
  }
  for (const auto& version : manifest.versions) versions_.restore(version.version, version.dir);
  queue_.set_next_number(manifest.next_micro_batch);
}

}  // namespace ht::worker
