#pragma once

#include <boost/asio/io_context.hpp>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "worker_protocol/messages.h"

namespace ht::workers {

struct WorkerOptions {
  std::filesystem::path program;  // hosted-tinker-worker
  std::string name;               // for logs
  std::filesystem::path log_file; // empty: inherits stderr
};

// One worker process and its three lanes (socket pairs inherited as --control-fd, --training-fd, --sampling-fd).
// All calls and callbacks on the io_context's thread. It does not restart anything: dispatch decides.
class WorkerGroup {
 public:
  struct Callbacks {
    std::function<void(worker_protocol::Reply)> on_reply;
    // The process is gone and every reply it wrote has been delivered. `reason`: "killed by signal 9", "exit code 1".
    std::function<void(std::string reason)> on_exit;
  };

  WorkerGroup(boost::asio::io_context& io, WorkerOptions options, Callbacks callbacks);
  ~WorkerGroup();

  void start();
  // Queues a request on its lane's stream, in order.
  void send(const worker_protocol::Request& request);
  // Closes the streams; kills the process if it is not gone after `grace`.
  void stop(std::chrono::milliseconds grace);
  int pid() const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace ht::workers
