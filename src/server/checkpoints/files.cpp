#include "server/checkpoints/files.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace ht::checkpoints {
namespace {

namespace fs = std::filesystem;

// An id of ours as a file name: it must not lead elsewhere.
const std::string& as_file_name(const std::string& id) {
  const bool bad = id.empty() || id.size() > 120 || id.front() == '.' ||
                   std::any_of(id.begin(), id.end(), [](char c) { return c == '/' || c == '~' || c == '\0'; });
  if (bad) throw server_error("\"" + id + "\" cannot name a directory");
  return id;
}

void sync(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool synced = fd >= 0 && ::fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) ::close(fd);
  if (!synced) throw server_error("cannot sync " + path.string() + ": " + std::strerror(error));
}

template <typename Body>
auto guarded(Body body) {
  try {
    return body();
  } catch (const fs::filesystem_error& error) {
    throw server_error(error.what());
  }
}

}  // namespace

Files::Files(fs::path data_dir)
    : data_dir_(std::move(data_dir)),
      checkpoints_(data_dir_ / "checkpoints"),
      staging_(data_dir_ / "staging"),
      versions_(data_dir_ / "versions") {
  guarded([&] {
    for (const fs::path& dir : {checkpoints_, staging_, versions_}) fs::create_directories(dir);
  });
}

fs::path Files::stage(const std::string& request_id) {
  const fs::path dir = staging_ / as_file_name(request_id);
  guarded([&] { fs::create_directories(dir); });
  return dir;
}

fs::path Files::place(const TinkerPath& path, const std::string& request_id) {
  const fs::path staged = staging_ / as_file_name(request_id);
  const fs::path kind_dir = checkpoints_ / as_file_name(path.run) / name_of(path.kind);
  const fs::path placed = kind_dir / (path.name + "~" + request_id);
  return guarded([&] {
    if (fs::exists(placed)) {
      // It was moved before a crash; what was staged since is the same again.
      fs::remove_all(staged);
      return placed;
    }
    if (!fs::is_directory(staged)) throw server_error("request " + request_id + " has no files in " + staged.string());
    const fs::path marker = staged / kCompleteMarker;
    const int fd = ::open(marker.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) throw server_error("cannot write " + marker.string() + ": " + std::strerror(errno));
    ::close(fd);
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(staged)) {
      if (entry.is_regular_file() || entry.is_directory()) sync(entry.path());
    }
    sync(staged);
    fs::create_directories(kind_dir);
    fs::rename(staged, placed);
    for (const fs::path& dir : {kind_dir, kind_dir.parent_path(), checkpoints_, staging_}) sync(dir);
    return placed;
  });
}

void Files::empty_staging() {
  guarded([&] {
    fs::remove_all(staging_);
    fs::create_directories(staging_);
  });
}

void Files::drop_staged(const std::string& request_id) {
  guarded([&] { fs::remove_all(staging_ / as_file_name(request_id)); });
}

std::string Files::relative(const fs::path& path) const {
  return path.lexically_relative(data_dir_).string();
}

std::vector<std::string> Files::versions() const {
  return guarded([&] {
    std::vector<std::string> names;
    for (const fs::directory_entry& entry : fs::directory_iterator(versions_)) {
      names.push_back(entry.path().filename().string());
    }
    return names;
  });
}

fs::path Files::version_dir(const std::string& version) {
  const fs::path dir = versions_ / as_file_name(version);
  guarded([&] { fs::create_directories(dir); });
  return dir;
}

void Files::drop_version(const std::string& version) {
  guarded([&] { fs::remove_all(versions_ / as_file_name(version)); });
}

void Files::remove(const fs::path& dir) {
  guarded([&] {
    fs::remove_all(dir);
    std::error_code not_empty;
    if (fs::remove(dir.parent_path(), not_empty)) fs::remove(dir.parent_path().parent_path(), not_empty);
  });
}

std::uint64_t Files::size_of(const fs::path& dir) {
  return guarded([&] {
    std::uint64_t bytes = 0;
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(dir)) {
      if (entry.is_regular_file()) bytes += entry.file_size();
    }
    return bytes;
  });
}

}  // namespace ht::checkpoints
