#include "worker/snapshot.h"

#include <fcntl.h>
#include <unistd.h>

#include <boost/json.hpp>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "base/error.h"

namespace ht::worker {

namespace json = boost::json;

namespace {

constexpr int kFormat = 1;
constexpr const char* kFile = "manifest.json";

void write_synced(const std::filesystem::path& file, const std::string& text) {
  const int fd = ::open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  bool good = fd >= 0;
  for (std::size_t at = 0; good && at < text.size();) {
    const ssize_t written = ::write(fd, text.data() + at, text.size() - at);
    if (written > 0) at += static_cast<std::size_t>(written);
    good = written > 0 || (written < 0 && errno == EINTR);
  }
  good = good && ::fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) ::close(fd);
  if (!good) throw server_error("cannot write " + file.string() + ": " + std::strerror(error));
}

}  // namespace

void write_manifest(const SnapshotManifest& manifest, const std::filesystem::path& dir) {
  json::array adapters, versions;
  for (const auto& entry : manifest.adapters) {
    adapters.push_back({{"adapter", entry.adapter}, {"file", entry.file}, {"last_request", entry.last_request}});
  }
  for (const auto& entry : manifest.versions) versions.push_back({{"version", entry.version}, {"dir", entry.dir}});
  const json::value document{{"format", kFormat},
                             {"next_micro_batch", manifest.next_micro_batch},
                             {"adapters", std::move(adapters)},
                             {"versions", std::move(versions)}};
  const std::filesystem::path temporary = dir / "manifest.json.tmp";
  write_synced(temporary, json::serialize(document));
  std::error_code error;
  std::filesystem::rename(temporary, dir / kFile, error);
  if (error) throw server_error("cannot write " + (dir / kFile).string() + ": " + error.message());
}

SnapshotManifest read_manifest(const std::filesystem::path& dir) {
  std::ifstream stream(dir / kFile);
  if (!stream) throw server_error(dir.string() + " is no snapshot: it has no readable " + kFile);
  std::stringstream text;
  text << stream.rdbuf();
  try {
    const json::value document = json::parse(text.str());
    if (document.at("format").to_number<int>() != kFormat) throw server_error("unknown format");
    SnapshotManifest manifest;
    manifest.next_micro_batch = document.at("next_micro_batch").to_number<std::uint64_t>();
    for (const json::value& entry : document.at("adapters").as_array()) {
      manifest.adapters.push_back({json::value_to<std::string>(entry.at("adapter")),
                                   json::value_to<std::string>(entry.at("file")),
                                   entry.at("last_request").to_number<std::uint64_t>()});
    }
    for (const json::value& entry : document.at("versions").as_array()) {
      manifest.versions.push_back(
          {json::value_to<std::string>(entry.at("version")), json::value_to<std::string>(entry.at("dir"))});
    }
    return manifest;
  } catch (const std::exception& error) {
    throw server_error("the snapshot " + dir.string() + " has a broken " + kFile + ": " + error.what());
  }
}

}  // namespace ht::worker
