#pragma once

#include <filesystem>

namespace ht::app {

// The data directory, held by one server at a time. Made if absent, for this user alone.
class DataDir {
 public:
  // Throws Error(user) when it cannot be made or another server holds it.
  explicit DataDir(const std::filesystem::path& path);
  ~DataDir();
  DataDir(const DataDir&) = delete;
  DataDir& operator=(const DataDir&) = delete;

  const std::filesystem::path& path() const { return path_; }  // absolute
  std::filesystem::path journal() const { return path_ / "journal"; }
  std::filesystem::path snapshots() const { return path_ / "snapshots"; }
  std::filesystem::path tokenizers() const { return path_ / "tokenizers"; }

 private:
  std::filesystem::path path_;
  int lock_fd_ = -1;
};

}  // namespace ht::app
