#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "worker_protocol/codec.h"
#include "worker_protocol/messages.h"

namespace ht::worker {

// One stream of framed requests and replies: a thread that reads, and one that writes so that a slow server never holds
// up the compute thread. Replies leave in the order of send().
class Lane {
 public:
  struct Callbacks {
    std::function<void(worker_protocol::Request)> on_request;
    // The peer closed the stream (empty), or what made it unreadable.
    std::function<void(const std::string& error)> on_end;
  };

  // Takes the descriptor over. Callbacks run on the reading thread, from now on.
  Lane(int fd, Callbacks callbacks, std::size_t max_frame_bytes = worker_protocol::kMaxFrameBytes);
  ~Lane();

  // A reply that cannot be framed, because it is too large or memory runs out, becomes a Failure of its request.
  void send(const worker_protocol::Reply& reply);
  // Waits until everything sent so far is written or the stream has failed.
  void flush();

 private:
  std::string framed(const worker_protocol::Reply& reply) const;
  void read_requests();
  void write_replies();

  const int fd_;
  const Callbacks callbacks_;
  const std::size_t max_frame_bytes_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::string> frames_;
  bool writing_ = false;
  bool closed_ = false;
  std::thread writer_;
  std::thread reader_;
};

}  // namespace ht::worker
