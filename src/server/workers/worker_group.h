#pragma once

#include <boost/asio/io_context.hpp>

#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "worker_protocol/messages.h"

namespace ht::workers {

struct WorkerOptions {
  std::filesystem::path program;            // hosted-tinker-worker
  std::string name;                         // for logs
  std::filesystem::path log_file;           // appended to; empty: inherits stderr
  std::vector<std::string> arguments = {};  // before those that name the lanes
};

// One worker process and its three lanes (socket pairs inherited as --control-fd, --training-fd, --sampling-fd).
// All calls and callbacks on the io_context's thread. It does not restart anything: dispatch decides. The process dies
// with us. A worker that sends what is no reply, or closes a stream and lives on, is killed.
class WorkerGroup {
 public:
  struct Callbacks {
    std::function<void(worker_protocol::Reply)> on_reply;
    // Once: the process is gone and every reply it wrote has been delivered. `reason`: "killed by signal 9 (Killed)",
    // "exit code 1". Either callback may destroy the group.
    std::function<void(std::string reason)> on_exit;
  };

  WorkerGroup(boost::asio::io_context& io, WorkerOptions options, Callbacks callbacks);
  // Kills the process if it still runs; no callback comes any more.
  ~WorkerGroup();

  // Throws Error(server) naming program and reason when it cannot be run. LD_LIBRARY_PATH gets HOSTED_TINKER_TORCH_LIB
  // in front; OMP_WAIT_POLICY is passive with a GOMP_SPINCOUNT of 3000, unless either is set.
  void start();
  // Queues a request on its lane's stream, in order. Lost if the process is gone: on_exit has come or will.
  void send(const worker_protocol::Request& request);
  // Returns at once. Closes our side of the streams once what is queued is written; kills the process if it is not gone
  // after `grace`. Replies and on_exit still come.
  void stop(std::chrono::milliseconds grace);
  int pid() const;  // 0: not started, or gone

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace ht::workers
