#include "server/app/data_dir.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "base/error.h"

namespace ht::app {

namespace fs = std::filesystem;

DataDir::DataDir(const fs::path& path) : path_(fs::absolute(path).lexically_normal()) {
  std::error_code error;
  if (!fs::is_directory(path_)) {
    fs::create_directories(path_, error);
    if (!error) fs::permissions(path_, fs::perms::owner_all, error);
  }
  if (error) throw user_error("the data directory " + path_.string() + " cannot be made: " + error.message());
  const fs::path lock = path_ / "lock";
  // Closed on exec: a worker that lives a moment longer must not hold it.
  lock_fd_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (lock_fd_ < 0) throw user_error(lock.string() + " cannot be opened: " + std::strerror(errno));
  if (::flock(lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    const int failure = errno;
    char holder[32] = {};
    const auto length = ::pread(lock_fd_, holder, sizeof holder - 1, 0);
    ::close(lock_fd_);
    if (failure != EWOULDBLOCK) throw user_error(lock.string() + " cannot be locked: " + std::strerror(failure));
    throw user_error("the data directory " + path_.string() + " is in use by another server" +
                     (length > 0 ? " (process " + std::string(holder) + ")" : std::string()) +
                     "; give this one another --data-dir");
  }
  const std::string pid = std::to_string(::getpid());
  if (::ftruncate(lock_fd_, 0) != 0 || ::pwrite(lock_fd_, pid.data(), pid.size(), 0) < 0) {
    ::close(lock_fd_);
    throw user_error(lock.string() + " cannot be written: " + std::strerror(errno));
  }
}

DataDir::~DataDir() {
  ::close(lock_fd_);
}

}  // namespace ht::app
