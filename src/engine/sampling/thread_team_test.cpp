#include "engine/sampling/thread_team.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace ht::engine {
namespace {

// Every task runs once, and no phase begins before all tasks of the one before are done.
TEST(ThreadTeam, PhasesFollowEachOther) {
  for (const int threads : {1, 2, 5}) {
    ThreadTeam team(threads);
    std::vector<int> runs(64);
    std::atomic<int> wrong = 0;
    const auto work = [&] {
      for (int phase = 0; phase < 500; ++phase) {
        team.phase(phase % 7 * 9, [&](std::int64_t task) { ++runs[static_cast<std::size_t>(task)]; });
        team.phase(phase % 7 * 9, [&](std::int64_t task) {
          wrong += runs[static_cast<std::size_t>(task)] != 1;
          runs[static_cast<std::size_t>(task)] = 0;
        });
      }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    EXPECT_EQ(wrong, 0) << threads << " threads";
  }
}

}  // namespace
}  // namespace ht::engine
