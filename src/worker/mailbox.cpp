#include "worker/mailbox.h"

#include <utility>

namespace ht::worker {

void Mailbox::put(worker_protocol::Request request) {
  {
    const std::lock_guard lock(mutex_);
    switch (worker_protocol::lane_of(request.body)) {
      case worker_protocol::Lane::control:
        mail_.control.push_back(std::move(request));
        break;
      case worker_protocol::Lane::training:
        mail_.training.push_back(std::move(request));
        break;
      case worker_protocol::Lane::sampling:
        mail_.sampling.push_back(std::move(request));
        break;
    }
  }
  arrived_.notify_one();
}

void Mailbox::cancel(worker_protocol::RequestId target) {
  {
    const std::lock_guard lock(mutex_);
    mail_.cancels.push_back(target);
  }
  arrived_.notify_one();
}

void Mailbox::post(FileThread::Then then) {
  {
    const std::lock_guard lock(mutex_);
    mail_.files.push_back(std::move(then));
  }
  arrived_.notify_one();
}

Mailbox::Mail Mailbox::take(bool wait) {
  std::unique_lock lock(mutex_);
  if (wait) arrived_.wait(lock, [this] { return !empty(); });
  return std::exchange(mail_, {});
}

Mailbox::Mail Mailbox::take_sampling() {
  const std::lock_guard lock(mutex_);
  Mail taken;
  taken.sampling = std::exchange(mail_.sampling, {});
  taken.cancels = std::exchange(mail_.cancels, {});
  taken.files = std::exchange(mail_.files, {});
  return taken;
}

}  // namespace ht::worker
