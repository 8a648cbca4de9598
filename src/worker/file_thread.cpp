#include "worker/file_thread.h"

#include <ATen/ATen.h>

#include <utility>

namespace ht::worker {

FileThread::FileThread(std::function<void(Then)> post) : post_(std::move(post)) {
  thread_ = std::thread([this] { run(); });
}

FileThread::~FileThread() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void FileThread::read(Job job) {
  {
    const std::lock_guard lock(mutex_);
    reads_.push_back(std::move(job));
  }
  changed_.notify_all();
}

void FileThread::write(Job job) {
  {
    const std::lock_guard lock(mutex_);
    writes_.push_back(std::move(job));
  }
  changed_.notify_all();
}

void FileThread::run() {
  const c10::InferenceMode no_autograd;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !reads_.empty() || !writes_.empty(); });
    if (stopping_) return;
    std::deque<Job>& from = reads_.empty() ? writes_ : reads_;
    Job job = std::move(from.front());
    from.pop_front();
    lock.unlock();
    Then then = job();
    job = nullptr;  // before the compute thread hears of it: it holds the buffers that were written
    post_(std::move(then));
    lock.lock();
  }
}

}  // namespace ht::worker
