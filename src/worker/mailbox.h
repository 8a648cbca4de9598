#pragma once

#include <condition_variable>
#include <mutex>
#include <vector>

#include "worker_protocol/messages.h"

namespace ht::worker {

// What the lanes' threads leave for the compute thread.
class Mailbox {
 public:
  struct Mail {
    std::vector<worker_protocol::Request> control, training, sampling;
    std::vector<worker_protocol::RequestId> cancels;
  };

  void put(worker_protocol::Request request);
  void cancel(worker_protocol::RequestId target);

  // Everything that came; with `wait`, not before something has.
  Mail take(bool wait);
  // Samples and cancels only: what may be looked at inside a micro-batch.
  Mail take_sampling();

 private:
  bool empty() const {
    return mail_.control.empty() && mail_.training.empty() && mail_.sampling.empty() && mail_.cancels.empty();
  }

  std::mutex mutex_;
  std::condition_variable arrived_;
  Mail mail_;
};

}  // namespace ht::worker
