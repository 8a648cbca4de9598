#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "engine/runtime/adapter.h"
#include "model_spec/model_spec.h"

namespace ht::worker {

// The immutable adapter versions that samplers read. They stay in memory up to a byte budget; the least recently used
// ones whose files are complete go first, and come back from their directory. A thread of its own writes files behind.
class Versions {
 public:
  // `base_model`: the name that adapter files state.
  Versions(const model_spec::ModelSpec& spec, std::string base_model, std::uint64_t budget_bytes);
  ~Versions();

  // Its files are written into `dir` behind; empty: it has none.
  void publish(const std::string& version, engine::AdapterWeights weights, const std::string& dir);
  // Loads `dir` when the version is not in memory. Throws Error(user) when there is no such version.
  std::shared_ptr<const engine::AdapterWeights> get(const std::string& version, const std::string& dir);
  void drop(const std::string& version);
  // A version that lies complete in `dir`.
  void restore(const std::string& version, const std::string& dir);

  // Waits until nothing is left to write; what failed is tried once more.
  void finish_files();
  struct OnDisk {
    std::string version;
    std::string dir;
  };
  std::vector<OnDisk> on_disk() const;
  std::uint64_t bytes_in_memory() const;

 private:
  struct Entry {
    std::shared_ptr<const engine::AdapterWeights> weights;  // null: on disk only
    std::string dir;
    bool complete = false;  // its files
    std::uint64_t last_use = 0;
    std::uint64_t generation = 0;  // of publish(): a newer one makes a write under way worthless
  };

  void write_files();
  void write(const engine::AdapterWeights& weights, const std::string& dir) const;
  void keep_budget();

  const model_spec::ModelSpec spec_;
  const std::string base_model_;
  const std::uint64_t budget_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, Entry> entries_;
  std::deque<std::string> to_write_;
  bool writing_ = false;
  bool stopping_ = false;
  std::uint64_t uses_ = 0;
  std::uint64_t generations_ = 0;
  std::thread writer_;
};

}  // namespace ht::worker
