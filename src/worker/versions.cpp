#include "worker/versions.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "worker/log.h"
#include "worker/replies.h"

namespace ht::worker {

namespace {

std::uint64_t bytes_of(const engine::AdapterWeights& weights) {
  return static_cast<std::uint64_t>(weights.flat.nbytes());
}

}  // namespace

Versions::Versions(const model_spec::ModelSpec& spec, std::string base_model, std::uint64_t budget_bytes,
                   FileThread& files)
    : spec_(spec), base_model_(std::move(base_model)), budget_bytes_(budget_bytes), files_(files) {}

bool Versions::has_room(std::uint64_t bytes) const {
  std::uint64_t unwritten = 0;
  for (const auto& [version, entry] : entries_) {
    if (entry.weights && !entry.complete) unwritten += bytes_of(*entry.weights);
  }
  return unwritten == 0 || unwritten + bytes <= budget_bytes_;
}

void Versions::publish(const std::string& version, engine::AdapterWeights weights, const std::string& dir) {
  Entry& entry = entries_[version];
  entry.weights = std::make_shared<const engine::AdapterWeights>(std::move(weights));
  entry.dir = dir;
  entry.published = true;
  entry.complete = entry.writing = false;
  entry.last_use = ++uses_;
  entry.generation = ++generations_;
  if (!dir.empty()) write(version, entry);
  keep_budget();
}

void Versions::write(const std::string& version, Entry& entry) {
  entry.writing = true;
  files_.write([this, version, weights = entry.weights, dir = entry.dir,
                generation = entry.generation]() mutable -> FileThread::Then {
    bool written = false;
    try {
      engine::save_adapter_weights(*weights, base_model_, dir);
      written = true;
    } catch (const std::exception& error) {
      log_error("the files of version " + version + " could not be written into " + dir + ": " + error.what());
    }
    weights.reset();
    return [this, version, generation, written] {
      const auto entry = entries_.find(version);
      if (entry == entries_.end() || entry->second.generation != generation) return;
      entry->second.writing = false;
      entry->second.complete = written;
      keep_budget();
    };
  });
}

Versions::Weights Versions::find(const std::string& version) {
  const auto found = entries_.find(version);
  if (found == entries_.end() || !found->second.weights) return nullptr;
  found->second.last_use = ++uses_;
  return found->second.weights;
}

void Versions::load(const std::string& version, const std::string& dir, std::function<void(const Error*)> then) {
  const auto found = entries_.find(version);
  const std::string from = !dir.empty() ? dir : found != entries_.end() ? found->second.dir : "";
  files_.read([this, version, from, then = std::move(then)]() -> FileThread::Then {
    Weights weights;
    std::optional<Error> error;
    try {
      if (from.empty()) {
        throw user_error("no adapter version " + version + " in this worker, and no directory to load it");
      }
      weights = std::make_shared<const engine::AdapterWeights>(engine::load_adapter_weights(spec_, from));
    } catch (const std::exception& thrown) {
      const auto failure = failure_of(thrown);
      error.emplace(failure.category, failure.message);
    }
    return [this, version, from, weights = std::move(weights), error, then]() mutable {
      if (!error) {
        Entry& entry = entries_[version];
        if (!entry.weights) {  // it was not published meanwhile
          entry.weights = std::move(weights);
          entry.dir = from;
          entry.complete = true;
        }
        entry.last_use = ++uses_;
      }
      then(error ? &*error : nullptr);
      keep_budget();
    };
  });
}

void Versions::drop(const std::string& version) {
  entries_.erase(version);
}

void Versions::restore(const std::string& version, const std::string& dir) {
  Entry entry;
  entry.dir = dir;
  entry.published = entry.complete = true;
  entries_[version] = std::move(entry);
}

void Versions::write_again() {
  for (auto& [version, entry] : entries_) {
    if (entry.weights && !entry.complete && !entry.writing && !entry.dir.empty()) write(version, entry);
  }
}

std::vector<Versions::OnDisk> Versions::on_disk() const {
  std::vector<OnDisk> complete;
  for (const auto& [version, entry] : entries_) {
    if (entry.published && entry.complete) complete.push_back({version, entry.dir});
  }
  return complete;
}

std::uint64_t Versions::bytes_in_memory() const {
  std::uint64_t bytes = 0;
  for (const auto& [version, entry] : entries_) bytes += entry.weights ? bytes_of(*entry.weights) : 0;
  return bytes;
}

// Of versions that running samples read, or that are not written yet.
std::uint64_t Versions::pinned_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& [version, entry] : entries_) {
    if (entry.weights && (!entry.complete || entry.weights.use_count() > 1)) bytes += bytes_of(*entry.weights);
  }
  return bytes;
}

void Versions::keep_budget() {
  std::uint64_t bytes = bytes_in_memory();
  while (bytes > budget_bytes_) {
    auto oldest = entries_.end();
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      const Entry& entry = it->second;
      // The one used last stays whatever the budget: its samples are about to start.
      if (!entry.weights || !entry.complete || entry.weights.use_count() > 1 || entry.last_use == uses_) continue;
      if (oldest == entries_.end() || entry.last_use < oldest->second.last_use) oldest = it;
    }
    if (oldest == entries_.end()) return;
    bytes -= bytes_of(*oldest->second.weights);
    oldest->second.weights.reset();
    if (oldest->second.published) continue;
    forgotten_.push_back(oldest->first);
    entries_.erase(oldest);
  }
}

}  // namespace ht::worker
