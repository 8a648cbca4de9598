#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/tinker_api/api.h"
#include "tinker_public.pb.h"
#include "worker_protocol/messages.h"

namespace ht::tinker_api {

// The message in `body`. Throws Error(user) for bytes that are none (truncated, not UTF-8 where text is due).
std::unique_ptr<tinker_public::ForwardBackwardRequest> parse_forward_backward(std::string_view body);

// Shape of each datum's target_tokens, which its `logprobs` output takes: (n) when k = 0, else (n, k).
struct TargetShape {
  std::int64_t n = 0;
  std::int64_t k = 0;

  friend bool operator==(const TargetShape&, const TargetShape&) = default;
};

struct DecodedForwardBackward {
  worker_protocol::ForwardBackward work;  // `adapter` is the request's model_id
  std::vector<TargetShape> shapes;
};

// Validates the request against the model and the loss, and lays it out flat. Throws Error(user) that names the datum,
// the value and what is allowed.
DecodedForwardBackward decode_forward_backward(const tinker_public::ForwardBackwardRequest& request,
                                               const ServedModel& model, const Limits& limits);

}  // namespace ht::tinker_api
