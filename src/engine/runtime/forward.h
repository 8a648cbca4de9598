#pragma once

// The forward pass without gradients, for the sampler and for scoring.

#include <ATen/core/Tensor.h>

#include <memory>
#include <span>
#include <vector>

#include "engine/ops/views.h"
#include "engine/runtime/adapter.h"
#include "engine/runtime/base_model.h"

namespace ht::engine {

// Views of an adapter's flat buffer, one per (fused) linear; on a device with another compute dtype, of a copy in it,
// which later changes of the buffer do not reach. With `grad` (same size as the flat buffer, float32, on the device)
// the factors' gradients are views of it. The tensors share their buffer's storage: the view stays valid while they do.
AdapterView make_adapter_view(const Device& device, const AdapterWeights& weights, const at::Tensor& grad = {});

// Runs embedding, all blocks and the final norm over a packed batch: (T, hidden) in the compute dtype, ready for
// `logits`. `attention` replaces the packed causal attention. Call it under c10::InferenceMode or at::NoGradGuard.
at::Tensor forward_hidden(const BaseModel& model, const PackedSequences& batch, std::span<const LoraSegment> segments,
                          InferenceAttention& attention);

// Unembedding with its LoRA of rows of forward_hidden's result: hidden (R, hidden) -> (R, vocab) float32. `segments`
// are in rows of `hidden`.
at::Tensor logits(const BaseModel& model, const at::Tensor& hidden, std::span<const LoraSegment> segments);
// The same into `out` (R, vocab), contiguous.
void logits_out(const BaseModel& model, const at::Tensor& hidden, std::span<const LoraSegment> segments,
                at::Tensor& out);

}  // namespace ht::engine
