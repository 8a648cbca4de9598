#pragma once

// The directories of checkpoints. A checkpoint's directory is named after the request that made it, so every step can
// be repeated, and an overwriting save never touches the files of the one before.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "server/checkpoints/checkpoints.h"

namespace ht::checkpoints {

inline constexpr std::string_view kCompleteMarker = "checkpoint_complete";  // the SDK's tools look for it

// Every function throws Error(server) naming the path when the file system refuses. May be called from any thread.
class Files {
 public:
  explicit Files(std::filesystem::path data_dir);

  // staging/<request>, made if absent.
  std::filesystem::path stage(const std::string& request_id);
  // Marks, syncs and moves the staged files; where they are now. Does nothing when that was done before.
  std::filesystem::path place(const TinkerPath& path, const std::string& request_id);
  void drop_staged(const std::string& request_id);
  void empty_staging();

  // Of a path below the data directory, and back.
  std::string relative(const std::filesystem::path& path) const;
  std::filesystem::path absolute(const std::string& relative) const { return data_dir_ / relative; }

  std::filesystem::path version_dir(const std::string& version);
  std::vector<std::string> versions() const;  // that have a directory
  void drop_version(const std::string& version);

  // Deletes a directory that place() gave, and its parents once they are empty.
  void remove(const std::filesystem::path& dir);
  static std::uint64_t size_of(const std::filesystem::path& dir);

 private:
  std::filesystem::path data_dir_, checkpoints_, staging_, versions_;
};

}  // namespace ht::checkpoints
