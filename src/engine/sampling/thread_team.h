#pragma once

#include <atomic>
#include <cstdint>

namespace ht::engine {

// Threads of one parallel region that go through the same phases: the tasks of a phase are handed out one by one, and
// no thread enters the next phase before all tasks are done. Between phases a thread spins for some microseconds, a
// fraction of what waking it costs, before it sleeps.
class ThreadTeam {
 public:
  explicit ThreadTeam(int threads) : threads_(threads) {}

  // Every thread of the team calls this with the same arguments: runs f(task) for each task in [0, tasks) once.
  template <typename F>
  void phase(std::int64_t tasks, const F& f) {
    if (threads_ == 1) {
      for (std::int64_t task = 0; task < tasks; ++task) f(task);
      return;
    }
    for (std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed); task < tasks;
         task = next_.fetch_add(1, std::memory_order_relaxed)) {
      f(task);
    }
    wait_for_all();
  }

 private:
  void wait_for_all() {
    constexpr int kSpins = 400;  // about 20 µs
    const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      __builtin_ia32_pause();
    }
    while (phase_.load(std::memory_order_acquire) == phase) phase_.wait(phase, std::memory_order_acquire);
  }

  const int threads_;
  alignas(64) std::atomic<std::int64_t> next_ = 0;
  alignas(64) std::atomic<int> arrived_ = 0;
  alignas(64) std::atomic<std::uint32_t> phase_ = 0;
};

}  // namespace ht::engine
