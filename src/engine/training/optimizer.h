#pragma once

#include <cstdint>

#include "engine/runtime/adapter.h"
#include "worker_protocol/messages.h"

namespace ht::engine {

// The 2-norm of a flat float32 tensor, summed in double over fixed blocks: the same bits for every number of threads.
double global_norm(const Device& device, const at::Tensor& flat);

// One step of AdamW (Loshchilov and Hutter 2019) with torch.optim.AdamW's arithmetic, after scaling the gradient as
// torch.nn.utils.clip_grad_norm_ does. `grad_norm` is the gradient's global norm. The gradient is left as it is.
void adamw_step(const Device& device, Adapter& adapter, const worker_protocol::AdamParams& params, double grad_norm);

}  // namespace ht::engine
