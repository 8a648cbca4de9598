#pragma once

namespace ht::engine {

// Prepares this process's CPU for the engine: checks that the processor runs x86-64-v3 code (AVX2, FMA, BMI2; Intel
// Haswell or AMD Excavator and later) and sets the number of compute threads (0: all cores). Throws Error(server) naming
// what the processor lacks.
void initialize_cpu(int threads);

}  // namespace ht::engine
