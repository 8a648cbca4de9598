#pragma once

#include <string>

#include "engine/device/device.h"

namespace ht::engine {

// The CUDA device of libht_cuda.so, which lies beside this program: loads it, once a process. Call it before anything
// of ATen asks for CUDA: ATen remembers that it found none. Returns nullptr when the device cannot be used, with the
// reason for people in `why_not` (no driver, no device, a library that is missing, …).
const Device* load_cuda_device(std::string& why_not);

// "cpu", "cuda", or "auto": CUDA where it can be used, else the CPU. `note` says what stands in the way where a driver
// finds a device and "auto" takes the CPU all the same. Throws Error(user) when "cuda" cannot be used or for another
// wish.
const Device& choose_device(const std::string& wish, std::string& note);

}  // namespace ht::engine
