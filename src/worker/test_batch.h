#pragma once

// For tests: training requests for the checkpoint of engine/runtime/test_checkpoint.h.

#include <string>

#include "worker_protocol/messages.h"

namespace ht::worker {

// `datums` of `length` tokens with next-token targets; other salts, other tokens.
inline worker_protocol::ForwardBackward batch(const std::string& adapter, int datums, int length, int salt = 0,
                                              bool forward_only = false) {
  worker_protocol::ForwardBackward request;
  request.adapter = adapter;
  request.forward_only = forward_only;
  request.batch.cu_seqlens.push_back(0);
  for (int i = 0; i < datums; ++i) {
    for (int t = 0; t < length; ++t) {
      request.batch.tokens.push_back((i * 5 + t * 3 + salt) % 31);
      request.batch.targets.push_back((i * 5 + (t + 1) * 3 + salt) % 31);
      request.batch.weights.push_back(1.0f);
    }
    request.batch.cu_seqlens.push_back(static_cast<std::int32_t>(request.batch.tokens.size()));
    request.batch.target_width.push_back(1);
  }
  return request;
}

}  // namespace ht::worker
