#include "engine/device/cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <string>
#include <thread>

#include "base/error.h"

namespace ht::engine {

void initialize_cpu(int threads) {
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
