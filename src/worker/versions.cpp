#include "worker/versions.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "worker/log.h"

namespace ht::worker {

namespace {

std::uint64_t bytes_of(const engine::AdapterWeights& weights) {
  return static_cast<std::uint64_t>(weights.flat.nbytes());
}

}  // namespace

Versions::Versions(const model_spec::ModelSpec& spec, std::string base_model, std::uint64_t budget_bytes)
    : spec_(spec), base_model_(std::move(base_model)), budget_bytes_(budget_bytes) {
  writer_ = std::thread([this] { write_files(); });
}

Versions::~Versions() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  writer_.join();
}

void Versions::write(const engine::AdapterWeights& weights, const std::string& dir) const {
  engine::save_adapter_weights(weights, base_model_, dir);
}

void Versions::publish(const std::string& version, engine::AdapterWeights weights, const std::string& dir) {
  {
    const std::lock_guard lock(mutex_);
    Entry& entry = entries_[version];
    entry.weights = std::make_shared<const engine::AdapterWeights>(std::move(weights));
    entry.dir = dir;
    entry.complete = false;
    entry.last_use = ++uses_;
    entry.generation = ++generations_;
    if (!dir.empty()) to_write_.push_back(version);
    keep_budget();
  }
  changed_.notify_all();
}

std::shared_ptr<const engine::AdapterWeights> Versions::get(const std::string& version, const std::string& dir) {
  std::unique_lock lock(mutex_);
  auto found = entries_.find(version);
  if (found == entries_.end()) {
    if (dir.empty()) throw user_error("no adapter version " + version + " in this worker, and no directory to load it");
    found = entries_.emplace(version, Entry{nullptr, dir, true, 0, 0}).first;
  }
  if (!found->second.weights) {
    // A checkpoint may have been renamed since it was written: the caller knows where it lies now.
    if (!dir.empty()) found->second.dir = dir;
    const std::string from = found->second.dir;
    lock.unlock();
    std::shared_ptr<const engine::AdapterWeights> weights;
    try {
      weights = std::make_shared<const engine::AdapterWeights>(engine::load_adapter_weights(spec_, from));
    } catch (...) {
      drop(version);
      throw;
    }
    lock.lock();
    found = entries_.try_emplace(version, Entry{nullptr, from, true, 0, 0}).first;
    found->second.weights = std::move(weights);
  }
  found->second.last_use = ++uses_;
  const auto weights = found->second.weights;
  keep_budget();
  return weights;
}

void Versions::drop(const std::string& version) {
  const std::lock_guard lock(mutex_);
  entries_.erase(version);
}

void Versions::restore(const std::string& version, const std::string& dir) {
  const std::lock_guard lock(mutex_);
  entries_[version] = Entry{nullptr, dir, true, 0, 0};
}

// Call it with the lock held.
void Versions::keep_budget() {
  std::uint64_t bytes = 0;
  for (const auto& [version, entry] : entries_) bytes += entry.weights ? bytes_of(*entry.weights) : 0;
  while (bytes > budget_bytes_) {
    auto oldest = entries_.end();
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      const Entry& entry = it->second;
      // The one in use right now stays, whatever the budget.
      if (!entry.weights || !entry.complete || entry.dir.empty() || entry.last_use == uses_) continue;
      if (oldest == entries_.end() || entry.last_use < oldest->second.last_use) oldest = it;
    }
    if (oldest == entries_.end()) return;
    bytes -= bytes_of(*oldest->second.weights);
    oldest->second.weights.reset();
  }
}

void Versions::write_files() {
  const c10::InferenceMode no_autograd;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !to_write_.empty(); });
    if (to_write_.empty()) return;
    const std::string version = to_write_.front();
    to_write_.pop_front();
    const auto found = entries_.find(version);
    if (found != entries_.end() && found->second.weights && !found->second.complete) {
      const auto weights = found->second.weights;
      const std::string dir = found->second.dir;
      const std::uint64_t generation = found->second.generation;
      writing_ = true;
      lock.unlock();
      bool written = false;
      try {
        write(*weights, dir);
        written = true;
      } catch (const std::exception& error) {
        log_error("the files of version " + version + " could not be written into " + dir + ": " + error.what());
      }
      lock.lock();
      writing_ = false;
      const auto entry = entries_.find(version);
      if (written && entry != entries_.end() && entry->second.generation == generation) {
        entry->second.complete = true;
        keep_budget();
      }
    }
    changed_.notify_all();
  }
}

void Versions::finish_files() {
  std::unique_lock lock(mutex_);
  const auto idle = [this] { return to_write_.empty() && !writing_; };
  changed_.wait(lock, idle);
  for (const auto& [version, entry] : entries_) {
    if (entry.weights && !entry.complete && !entry.dir.empty()) to_write_.push_back(version);
  }
  changed_.notify_all();
  changed_.wait(lock, idle);
}

std::vector<Versions::OnDisk> Versions::on_disk() const {
  const std::lock_guard lock(mutex_);
  std::vector<OnDisk> complete;
  for (const auto& [version, entry] : entries_) {
    if (entry.complete) complete.push_back({version, entry.dir});
  }
  return complete;
}

std::uint64_t Versions::bytes_in_memory() const {
  const std::lock_guard lock(mutex_);
  std::uint64_t bytes = 0;
  for (const auto& [version, entry] : entries_) bytes += entry.weights ? bytes_of(*entry.weights) : 0;
  return bytes;
}

}  // namespace ht::worker
