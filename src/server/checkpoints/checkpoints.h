#pragma once

// The user's checkpoints: tinker:// paths, directories and their records (SQLite), TTL.

#include <boost/asio/awaitable.hpp>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model_spec/lora_sites.h"

namespace ht::store {
class Database;
class FileWork;
}  // namespace ht::store

namespace ht::checkpoints {

using Clock = std::chrono::system_clock;

enum class Kind { weights, sampler_weights };
std::string_view name_of(Kind kind);  // "weights"
std::string_view type_of(Kind kind);  // "training", "sampler"

// tinker://<run>/<kind>/<name>
struct TinkerPath {
  std::string run;
  Kind kind = Kind::weights;
  std::string name;

  // Error(user) naming the text and the form that is wanted.
  static TinkerPath parse(std::string_view text);
  std::string str() const;
  std::string checkpoint_id() const;  // "weights/0001"
};

// A checkpoint's name: one path segment of letters, digits, '.', '_', '-' and ' ', not starting with a dot.
// Error(user).
void check_name(std::string_view name);

struct Checkpoint {
  TinkerPath path;
  std::filesystem::path dir;
  Clock::time_point created_at;
  std::optional<Clock::time_point> expires_at;
  std::uint64_t size_bytes = 0;
  bool is_public = false;
  std::map<std::string, std::string> user_metadata;
  std::string base_model;  // as the client named it
  std::string base_dir;
  model_spec::LoraConfig lora;
  std::string request_id;  // that made it
};

class Checkpoints {
 public:
  virtual ~Checkpoints() = default;

  // Error(user) when `path` exists and neither overwrite is set nor the same request made it.
  virtual void check_free(const TinkerPath& path, bool overwrite, const std::string& request_id) const = 0;
  // A directory for the worker to write into; derived from request_id, so that a repeated request reuses it. A start
  // empties them all: what was not committed is saved again.
  virtual std::filesystem::path stage(const std::string& request_id) = 0;
  // Syncs the staged files, moves them into place (both off this thread), registers. Repeating it for one request_id
  // changes nothing.
  virtual boost::asio::awaitable<Checkpoint> commit(Checkpoint checkpoint, bool overwrite) = 0;

  // Not expired, or nothing.
  virtual std::optional<Checkpoint> find(const TinkerPath& path) const = 0;
  virtual std::vector<Checkpoint> list_run(const std::string& run) const = 0;  // newest first
  virtual bool has_run(const std::string& run) const = 0;                      // any checkpoint of it
  virtual std::vector<Checkpoint> list(std::size_t limit, std::size_t offset, std::size_t* total) const = 0;
  virtual bool remove(const TinkerPath& path) = 0;
  virtual bool set_ttl(const TinkerPath& path, std::optional<std::chrono::seconds> ttl) = 0;
  virtual bool set_public(const TinkerPath& path, bool is_public) = 0;
  // Deletes what has expired.
  virtual void expire() = 0;

  // The path of a directory below the data directory, as it is to be kept.
  virtual std::string relative(const std::filesystem::path& dir) const = 0;
  // Directory for the files of an ephemeral sampler version.
  virtual std::filesystem::path version_dir(const std::string& version) = 0;
  // Deletes the directories of all versions that are not `needed`.
  virtual void sweep_versions(std::function<bool(const std::string& version)> needed) = 0;
};

// Keeps the files under `data_dir`: checkpoints/<run>/<kind>/<name>~<request>, staging/<request>, versions/<version>.
// The database names them by their path below it. Finishes deletions that a crash cut short. Directories are removed
// behind, by `file_work`. Both outlive the result.
std::unique_ptr<Checkpoints> make_checkpoints(store::Database& database, store::FileWork& file_work,
                                              const std::filesystem::path& data_dir);

}  // namespace ht::checkpoints
