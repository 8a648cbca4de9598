#pragma once

#include "engine/device/device.h"

namespace ht::engine {

// Prepares this process's CPU for the engine: checks that the processor runs x86-64-v3 code (AVX2, FMA, BMI2; Intel
// Haswell or AMD Excavator and later) and sets the number of compute threads (0: all cores). Throws Error(server)
// naming what the processor lacks.
void initialize_cpu(int threads);

// float32 on this process's CPU, which the engine's caller has prepared by initialize_cpu.
const Device& cpu_device();

// For tests: the engine in `dtype` (float32 or bfloat16) on the plain reference kernels (kernels/reference) and ATen's
// operators, so that the path of a device with another compute dtype runs where there is none.
const Device& reference_device(at::ScalarType dtype);

}  // namespace ht::engine
