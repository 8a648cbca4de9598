#pragma once

#include <cstdint>
#include <fstream>
#include <string>

namespace ht {

// A figure of /proc/self/status in bytes: "VmRSS" (memory in use), "VmHWM" (the most so far, since exec: getrusage's
// figure would include the parent's), "RssAnon" (without mapped files). 0 where there is none.
inline std::uint64_t memory_of_process(const std::string& name) {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word && word != name + ":") continue;
  std::uint64_t kib = 0;
  status >> kib;
  return kib * 1024;
}

}  // namespace ht
