#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <span>
#include <vector>

#include "engine/models/dense_decoder.h"
#include "engine/ops/views.h"

namespace ht::engine {

// What a training forward keeps for its backward.
struct Tape {
  RopeTable rope;
  AttentionRanges ranges;
  std::vector<DecoderBlock::Saved> blocks;
  at::Tensor last;  // the last block's output (T, hidden)
  at::Tensor last_rstd;
};

using BetweenBlocks = std::function<void()>;  // may be empty

// Embedding, blocks and final norm: (T, hidden). `tape` nullptr: no backward will follow. `inference` nullptr: packed
// causal attention.
at::Tensor run_blocks(const DenseDecoder& model, const PackedSequences& batch, std::span<const LoraSegment> segments,
                      InferenceAttention* inference, Tape* tape, Recompute recompute,
                      const BetweenBlocks& between_blocks);
// Adds the LoRA gradients given d(hidden) (T, hidden) of run_blocks' result. Consumes the tape.
// The batch's cu_seqlens must live still.
void run_blocks_backward(const DenseDecoder& model, std::span<const LoraSegment> segments, Tape& tape,
                         const at::Tensor& dhidden, Recompute recompute, const BetweenBlocks& between_blocks);

}  // namespace ht::engine
