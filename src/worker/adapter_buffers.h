#pragma once

#include <ATen/ATen.h>

#include "engine/runtime/adapter.h"

namespace ht::worker {

// A file that is written behind shares the adapter's buffers. Whoever changes one makes it its own first: by a copy,
// while the file is not complete.
inline void own(at::Tensor& buffer) {
  if (buffer.use_count() > 1) buffer = buffer.clone();
}
inline void own(engine::Adapter& adapter) {
  for (at::Tensor* buffer : {&adapter.weights.flat, &adapter.grad, &adapter.exp_avg, &adapter.exp_avg_sq}) own(*buffer);
}

}  // namespace ht::worker
