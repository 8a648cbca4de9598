#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace ht::worker {

// The one thread that reads and writes adapter files while the worker runs, so that nobody waits for a disk but those
// who asked for it. Reads go before writes that have not begun; reads keep their order, and so do writes.
class FileThread {
 public:
  // What the compute thread does when a job has run. Must not throw.
  using Then = std::function<void()>;
  // Runs on the file thread. Must not throw.
  using Job = std::function<Then()>;

  // `post` hands a Then to the compute thread; it is called on the file thread.
  explicit FileThread(std::function<void(Then)> post);
  // Ends the job that runs; the others are dropped.
  ~FileThread();

  void read(Job job);
  void write(Job job);

 private:
  void run();

  const std::function<void(Then)> post_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> reads_, writes_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace ht::worker
