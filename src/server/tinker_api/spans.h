#pragma once

#include <cstdint>
#include <string>

#include "tinker_public.pb.h"

namespace ht::tinker_api {

// Provenance of a datum, which stable_reinforce needs: model_input_spans tile the `length` input positions,
// loss_fn_input_spans the targets, and an advantage other than 0 stands on sampled positions only. Error(user)
// otherwise. `advantages` must have been checked to be a tensor of `length` values.
void check_spans(const tinker_public::Datum& datum, const std::string& name, std::int64_t length,
                 const std::string& loss);

}  // namespace ht::tinker_api
