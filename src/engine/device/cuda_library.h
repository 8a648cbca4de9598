#pragma once

#include <string>

#include "engine/device/device.h"

namespace ht::engine {

// The CUDA device of libht_cuda.so, which lies beside this program: loads it, once a process. Call it before anything
// of ATen asks for CUDA: ATen remembers that it found none. Returns nullptr when the device cannot be used, with the
// reason for people in `why_not` (no driver, no device, a library that is missing, …).
const Device* load_cuda_device(std::string& why_not);

}  // namespace ht::engine
