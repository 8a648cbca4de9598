#include "worker/lanes.h"

#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "worker/replies.h"
#include "worker_protocol/codec.h"

namespace ht::worker {

namespace {

constexpr std::size_t kReadBytes = std::size_t{1} << 18;

bool write_all(int fd, const std::string& bytes) {
  for (std::size_t at = 0; at < bytes.size();) {
    const ssize_t written = ::write(fd, bytes.data() + at, bytes.size() - at);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    at += static_cast<std::size_t>(written);
  }
  return true;
}

}  // namespace

Lane::Lane(int fd, Callbacks callbacks, std::size_t max_frame_bytes)
    : fd_(fd), callbacks_(std::move(callbacks)), max_frame_bytes_(max_frame_bytes) {
  writer_ = std::thread([this] { write_replies(); });
  reader_ = std::thread([this] { read_requests(); });
}

Lane::~Lane() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
  ::shutdown(fd_, SHUT_RDWR);
  reader_.join();
  writer_.join();
  ::close(fd_);
}

std::string Lane::framed(const worker_protocol::Reply& reply) const {
  try {
    std::string bytes = worker_protocol::frame(worker_protocol::encode(reply));
    if (bytes.size() > max_frame_bytes_) {
      throw server_error("the result takes " + std::to_string(bytes.size()) + " bytes, at most " +
                         std::to_string(max_frame_bytes_) + " can be sent");
    }
    return bytes;
  } catch (const std::exception& error) {
    return worker_protocol::frame(worker_protocol::encode(worker_protocol::Reply{reply.id, failure_of(error)}));
  }
}

void Lane::send(const worker_protocol::Reply& reply) {
  std::string bytes = framed(reply);
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    frames_.push_back(std::move(bytes));
  }
  changed_.notify_all();
}

void Lane::flush() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return closed_ || (frames_.empty() && !writing_); });
}

void Lane::write_replies() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return closed_ || !frames_.empty(); });
    if (closed_) return;
    const std::string bytes = std::move(frames_.front());
    frames_.pop_front();
    writing_ = true;
    lock.unlock();
    const bool written = write_all(fd_, bytes);
    lock.lock();
    writing_ = false;
    // The server is gone. The end of the control stream ends the worker.
    if (!written) closed_ = true;
    changed_.notify_all();
  }
}

void Lane::read_requests() {
  worker_protocol::FrameReader frames;
  std::vector<char> buffer(kReadBytes);
  std::string error;
  try {
    while (true) {
      const ssize_t count = ::read(fd_, buffer.data(), buffer.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0 && errno != ECONNRESET) error = std::strerror(errno);
      if (count <= 0) break;
      frames.feed({buffer.data(), static_cast<std::size_t>(count)});
      while (const auto payload = frames.next()) callbacks_.on_request(worker_protocol::decode_request(*payload));
    }
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  callbacks_.on_end(error);
}

}  // namespace ht::worker
