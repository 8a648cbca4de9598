#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cerrno>
#include <cstring>
#include <set>

#include "base/error.h"
#include "safetensors/safetensors.h"

namespace ht::safetensors {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const fs::path& file, const char* what) {
  throw server_error(std::string("cannot ") + what + " " + file.string() + ": " + std::strerror(errno));
}

// A file that vanishes unless commit() has given it its name.
class TemporaryFile {
 public:
  explicit TemporaryFile(const fs::path& target)
      : target_(target), path_(target.string() + ".tmp." + std::to_string(::getpid())) {
    fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd_ < 0) fail(path_, "create");
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!committed_) ::unlink(path_.c_str());
  }

  void append(const void* data, std::size_t size) {
    const char* next = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t written = ::write(fd_, next, std::min(size, std::size_t{1} << 30));
      if (written < 0) {
        if (errno == EINTR) continue;
        fail(path_, "write");
      }
      next += written;
      size -= static_cast<std::size_t>(written);
    }
  }

  void commit() {
    if (::fsync(fd_) != 0) fail(path_, "sync");
    const int fd = fd_;
    fd_ = -1;
    if (::close(fd) != 0) fail(path_, "close");
    if (::rename(path_.c_str(), target_.c_str()) != 0) fail(target_, "rename to");
    committed_ = true;
    const fs::path dir = target_.has_parent_path() ? target_.parent_path() : fs::path(".");
    const int dir_fd = ::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir_fd < 0) fail(dir, "open");
    const int result = ::fsync(dir_fd);
    ::close(dir_fd);
    if (result != 0) fail(dir, "sync");
  }

 private:
  fs::path target_;
  fs::path path_;
  int fd_ = -1;
  bool committed_ = false;
};

std::uint64_t byte_size(const TensorToWrite& tensor) {
  std::uint64_t bytes = size_of(tensor.dtype);
  for (const std::int64_t n : tensor.shape) {
    if (n < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(n), &bytes)) {
      throw server_error("tensor \"" + tensor.name + "\" has an impossible dimension: " + std::to_string(n));
    }
  }
  return bytes;
}

}  // namespace

void write_file(const fs::path& file, const std::vector<TensorToWrite>& tensors,
                const std::map<std::string, std::string>& metadata) {
  boost::json::object header;
  if (!metadata.empty()) {
    boost::json::object object;
    for (const auto& [key, value] : metadata) object[key] = value;
    header["__metadata__"] = std::move(object);
  }
  std::uint64_t offset = 0;
  for (const TensorToWrite& tensor : tensors) {
    if (tensor.name == "__metadata__" || header.contains(tensor.name)) {
      throw server_error("a tensor cannot be named \"" + tensor.name + "\" here (reserved or written twice)");
    }
    const std::uint64_t end = offset + byte_size(tensor);
    header[tensor.name] = {{"dtype", name_of(tensor.dtype)},
                           {"shape", boost::json::array(tensor.shape.begin(), tensor.shape.end())},
                           {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = boost::json::serialize(header);
  text.append((8 - text.size() % 8) % 8, ' ');  // the data starts aligned

  TemporaryFile out(file);
  const std::uint64_t header_size = text.size();
  out.append(&header_size, sizeof(header_size));
  out.append(text.data(), text.size());
  for (const TensorToWrite& tensor : tensors) out.append(tensor.data, static_cast<std::size_t>(byte_size(tensor)));
  out.commit();
}

}  // namespace ht::safetensors
