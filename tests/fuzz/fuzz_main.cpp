// libFuzzer's entry for HT_FUZZ_TARGET, a function of targets.h.

#include <cstddef>
#include <cstdint>

#include "targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  ht::fuzz::HT_FUZZ_TARGET({reinterpret_cast<const char*>(data), size});
  return 0;
}
