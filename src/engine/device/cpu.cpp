#include "engine/device/cpu.h"

#include <ATen/Parallel.h>
#include <malloc.h>

#include <algorithm>
#include <string>
#include <thread>

#include "base/error.h"

namespace ht::engine {

namespace {

// Every step allocates and frees the same large tensors. By default glibc maps and unmaps each of them, and the kernel
// clears their pages every time; so memory is kept for the next step instead, in one arena for all threads.
void keep_freed_memory() {
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest that glibc takes
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
}

}  // namespace

void initialize_cpu(int threads) {
  keep_freed_memory();
  __builtin_cpu_init();
  std::string missing;
  if (!__builtin_cpu_supports("avx2")) missing += " AVX2";
  if (!__builtin_cpu_supports("fma")) missing += " FMA";
  if (!__builtin_cpu_supports("bmi2")) missing += " BMI2";
  if (!missing.empty()) {
    throw server_error("this processor lacks" + missing +
                       ": the CPU engine needs x86-64-v3 (Intel Haswell or AMD Excavator and later)");
  }
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  at::set_num_threads(threads > 0 ? threads : cores);
}

}  // namespace ht::engine
