#pragma once

#include "engine/device/device.h"

namespace ht::engine {

// The one symbol of libht_cuda.so, and what stands between it and the program that loads it.
struct CudaEntryResult {
  const Device* device;  // lives as long as the process; nullptr: see why_not
  const char* why_not;   // a static string
};
using CudaEntry = CudaEntryResult (*)(int version);
inline constexpr const char* kCudaEntryName = "ht_cuda_device";
// Counted up whenever Device or HtKernelTable changes: a library of another build is refused.
inline constexpr int kCudaEntryVersion = 1;

}  // namespace ht::engine
