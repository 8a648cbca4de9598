#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "engine/runtime/adapter.h"
#include "model_spec/model_spec.h"
#include "worker/file_thread.h"

namespace ht::worker {

// The immutable adapter versions that samplers read. They stay in memory up to a byte budget; the least recently used
// ones whose files are complete and that nobody reads go first, and come back from their directory. Files are read and
// written on the file thread. Everything here runs on the compute thread.
class Versions {
 public:
  using Weights = std::shared_ptr<const engine::AdapterWeights>;

  // `base_model`: the name that adapter files state.
  Versions(const model_spec::ModelSpec& spec, std::string base_model, std::uint64_t budget_bytes, FileThread& files);

  // Whether `bytes` more may be published: versions whose files are not written yet cannot leave memory, and together
  // with the new one they stay within the budget, unless there are none.
  bool has_room(std::uint64_t bytes) const;
  // Its files are written into `dir` behind; empty: it has none.
  void publish(const std::string& version, engine::AdapterWeights weights, const std::string& dir);

  // The version if it is in memory, else null.
  Weights find(const std::string& version);
  // Whether a version may be loaded now: those that somebody reads are below the budget.
  bool may_load() const { return pinned_bytes() < budget_bytes_; }
  // Reads the version's files, from `dir` if it is given (a checkpoint may have moved since it was written). One that
  // was not published here is known for as long as it is in memory. `then` hears of the error, or null.
  void load(const std::string& version, const std::string& dir, std::function<void(const Error*)> then);

  void drop(const std::string& version);
  // A version that lies complete in `dir`.
  void restore(const std::string& version, const std::string& dir);

  // Tries once more to write what could not be written. What was published so far is settled when the file thread comes
  // to a job that is added after this call.
  void write_again();
  struct OnDisk {
    std::string version;
    std::string dir;
  };
  // Published versions whose files are complete.
  std::vector<OnDisk> on_disk() const;
  std::uint64_t bytes_in_memory() const;
  // Versions that left memory and are not known any more, since the last call.
  std::vector<std::string> take_forgotten() { return std::exchange(forgotten_, {}); }

 private:
  struct Entry {
    Weights weights;  // null: on disk only
    std::string dir;
    bool published = false;  // here, or restored: it belongs to a snapshot
    bool complete = false;   // its files
    bool writing = false;
    std::uint64_t last_use = 0;
    std::uint64_t generation = 0;  // of publish(): a newer one makes a write under way worthless
  };

  void write(const std::string& version, Entry& entry);
  void keep_budget();
  std::uint64_t pinned_bytes() const;

  const model_spec::ModelSpec spec_;
  const std::string base_model_;
  const std::uint64_t budget_bytes_;
  FileThread& files_;
  std::map<std::string, Entry> entries_;
  std::vector<std::string> forgotten_;
  std::uint64_t uses_ = 0;
  std::uint64_t generations_ = 0;
};

}  // namespace ht::worker
