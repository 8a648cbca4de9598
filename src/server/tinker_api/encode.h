#pragma once

// Results as the SDK reads them.

#include <boost/json.hpp>

#include <chrono>
#include <string>
#include <vector>

#include "server/tinker_api/decode_forward_backward.h"
#include "worker_protocol/messages.h"

namespace ht::tinker_api {

// ForwardBackwardOutput with one ArrayRecord, or one for each distinct trailing shape when they follow one another:
// `logprobs` float32 in the shape of each datum's target_tokens, in request order. Throws Error(server) when the number
// of logprobs does not fit the shapes.
std::string encode_forward_backward(const worker_protocol::TrainResult& result, const std::vector<TargetShape>& shapes);

// SampleResponse for `request`. Throws Error(server) when the result does not fit it (number of sequences, lengths).
std::string encode_sample(const worker_protocol::SampleResult& result, const worker_protocol::Sample& request,
                          bool sparse_targets);

// {"metrics": {...}}. JSON has no NaN or infinity: such values are left out.
std::string encode_optim_step(const worker_protocol::OptimResult& result);

// RFC 3339 in UTC with microseconds: "2026-01-31T12:34:56.789012Z".
std::string rfc3339(std::chrono::system_clock::time_point time);

}  // namespace ht::tinker_api
