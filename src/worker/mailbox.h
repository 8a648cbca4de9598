#pragma once

#include <condition_variable>
#include <mutex>
#include <vector>

#include "worker/file_thread.h"
#include "worker_protocol/messages.h"

namespace ht::worker {

// What the lanes' threads and the file thread leave for the compute thread.
class Mailbox {
 public:
  struct Mail {
    std::vector<worker_protocol::Request> control, training, sampling;
    std::vector<worker_protocol::RequestId> cancels;
    std::vector<FileThread::Then> files;  // of jobs that the file thread has run
  };

  void put(worker_protocol::Request request);
  void cancel(worker_protocol::RequestId target);
  void post(FileThread::Then then);

  // Everything that came; with `wait`, not before something has.
  Mail take(bool wait);
  // Samples, cancels and what comes of files: what may be looked at inside a micro-batch.
  Mail take_sampling();

 private:
  bool empty() const {
    return mail_.control.empty() && mail_.training.empty() && mail_.sampling.empty() && mail_.cancels.empty() &&
           mail_.files.empty();
  }

  std::mutex mutex_;
  std::condition_variable arrived_;
  Mail mail_;
};

}  // namespace ht::worker
