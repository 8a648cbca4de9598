#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/tinker_api/api.h"
#include "server/tinker_api/json_fields.h"
#include "worker_protocol/messages.h"

namespace ht::tinker_api {

struct DecodedSample {
  worker_protocol::Sample work;  // without version and version_dir
  bool sparse_targets = false;   // the request's target_prompt_logprobs was CSR: so must the answer be
};

// Validates an asample body against the model. An absent seed becomes `drawn_seed`. Throws Error(user) with the
// numbers.
DecodedSample decode_sample(const json::object& body, const ServedModel& model, const Limits& limits,
                            std::uint64_t drawn_seed);

}  // namespace ht::tinker_api
