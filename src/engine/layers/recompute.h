#pragma once

#include "model_spec/memory_plan.h"

namespace ht::engine {

// What a block's backward computes again instead of keeping it from the forward pass.
using Recompute = model_spec::RecomputePolicy;

}  // namespace ht::engine
