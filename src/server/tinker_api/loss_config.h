#pragma once

#include "tinker_public.pb.h"
#include "worker_protocol/losses.h"

namespace ht::tinker_api {

// The loss that the request names. Error(user) listing the known ones.
const worker_protocol::LossSpec& requested_loss(const tinker_public::ForwardBackwardRequest& request);

// Defaults of the loss under the request's configuration; loss_fn_config_v2 wins when it has entries. A text value must
// hold a number. Error(user) for unknown keys and for values outside their range.
worker_protocol::LossConfig requested_loss_config(const tinker_public::ForwardBackwardRequest& request,
                                                  const worker_protocol::LossSpec& spec);

}  // namespace ht::tinker_api
