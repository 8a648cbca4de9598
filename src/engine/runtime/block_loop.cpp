#include "engine/runtime/block_loop.h"

#include <ATen/ATen.h>

#include "engine/ops/attention.h"
#include "engine/ops/host_data.h"
#include "engine/ops/rms_norm.h"
#include "engine/runtime/base_model_impl.h"
#include "engine/runtime/forward.h"

namespace ht::engine {

namespace {

at::Tensor embed(const at::Tensor& table, std::span<const std::int32_t> tokens) {
  return table.index_select(0, host_data(tokens).to(table.device()));
}

}  // namespace

at::Tensor run_blocks(const DenseDecoder& model, const PackedSequences& batch, std::span<const LoraSegment> segments,
                      InferenceAttention* inference, Tape* tape, Recompute recompute,
                      const BetweenBlocks& between_blocks) {
  RopeTable rope = rope_table(model.spec, batch);
  rope = {rope.cos.to(model.device.torch_device()), rope.sin.to(model.device.torch_device())};
  const AttentionRanges ranges = attention_ranges(model.device, batch.cu_seqlens);
  const BlockContext context{model.device, ranges, rope, segments, inference};
  at::Tensor h = embed(model.embedding, batch.tokens);
  if (tape != nullptr) tape->blocks.resize(model.blocks.size());
  for (std::size_t i = 0; i < model.blocks.size(); ++i) {
    h = model.blocks[i].forward(h, context, tape != nullptr ? &tape->blocks[i] : nullptr, recompute);
    if (between_blocks) between_blocks();
  }
  at::Tensor rstd;
  at::Tensor hidden = rms_norm_forward(model.device, h, model.final_norm, model.spec.rms_norm_eps, rstd);
  if (tape != nullptr) {
    tape->rope = std::move(rope);
    tape->ranges = ranges;
    tape->last = std::move(h);
    tape->last_rstd = std::move(rstd);
  }
  return hidden;
}

void run_blocks_backward(const DenseDecoder& model, std::span<const LoraSegment> segments, Tape& tape,
                         const at::Tensor& dhidden, Recompute recompute, const BetweenBlocks& between_blocks) {
  const BlockContext context{model.device, tape.ranges, tape.rope, segments, nullptr};
  at::Tensor dh = at::zeros_like(tape.last);
  rms_norm_backward(model.device, dhidden, tape.last, model.final_norm, tape.last_rstd, dh);
  for (std::size_t i = model.blocks.size(); i-- > 0;) {
    model.blocks[i].backward(dh, context, tape.blocks[i], recompute, i > 0);
    if (between_blocks) between_blocks();
  }
  tape = Tape{};
}

at::Tensor forward_hidden(const BaseModel& model, const PackedSequences& batch, std::span<const LoraSegment> segments,
                          InferenceAttention& attention) {
  return run_blocks(model.impl().model, batch, segments, &attention, nullptr, Recompute::none, {});
}

at::Tensor logits(const BaseModel& model, const at::Tensor& hidden, std::span<const LoraSegment> segments) {
  at::Tensor out = at::empty({hidden.size(0), model.spec().vocab_size}, model.device().float_options());
  logits_out(model, hidden, segments, out);
  return out;
}

void logits_out(const BaseModel& model, const at::Tensor& hidden, std::span<const LoraSegment> segments,
                at::Tensor& out) {
  model.impl().model.head.logits_out(hidden, segments, out);
}

}  // namespace ht::engine
