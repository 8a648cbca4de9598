#include "engine/layers/self_attention.h"

#include <ATen/ATen.h>

#include "engine/layers/lora_linear.h"

namespace ht::engine {

at::Tensor SelfAttention::forward(const at::Tensor& x, const at::Tensor& residual, const BlockContext& context,
                                  Saved* saved) const {
  const LoraView lora_qkv = LoraView::of_layer(context.segments, layer, LoraSlot::qkv);
  const LoraView lora_o = LoraView::of_layer(context.segments, layer, LoraSlot::o);
  at::Tensor projected = lora_linear_forward(qkv, lora_qkv, x, saved ? &saved->u_qkv : nullptr);
  Heads heads = norm_rope_forward(context.device, projected, shape, context.rope, q_norm, k_norm, norm_eps);
  std::vector<at::Tensor> kept;
  const at::Tensor attended =
      context.inference != nullptr
          ? context.inference->attend(layer, heads.q, heads.k, heads.v)
          : context.device.attention_forward(heads.q, heads.k, heads.v, context.ranges, window, kept);
  at::Tensor y = lora_linear_forward_residual(o, lora_o, attended, residual, saved ? &saved->u_o : nullptr);
  if (saved != nullptr) {
    saved->qkv = std::move(projected);
    saved->heads = std::move(heads);
    saved->attended = attended;
    saved->attention = std::move(kept);
  }
  return y;
}

at::Tensor SelfAttention::backward(const at::Tensor& dy, const at::Tensor& x, const BlockContext& context, Saved& saved,
                                   bool need_dx) const {
  const LoraView lora_qkv = LoraView::of_layer(context.segments, layer, LoraSlot::qkv);
  const LoraView lora_o = LoraView::of_layer(context.segments, layer, LoraSlot::o);
  const at::Tensor d_attended = lora_linear_backward(o, lora_o, saved.attended, saved.u_o, dy);
  at::Tensor dqkv = at::empty_like(saved.qkv);
  context.device.attention_backward(d_attended, saved.heads.q, saved.heads.k, saved.heads.v, saved.attended,
                                    context.ranges, window, saved.attention, dqkv);
  norm_rope_backward(context.device, dqkv, saved.qkv, saved.heads, shape, context.rope, q_norm, k_norm);
  at::Tensor dx = lora_linear_backward(qkv, lora_qkv, x, saved.u_qkv, dqkv, need_dx);
  saved = Saved{};
  return dx;
}

}  // namespace ht::engine
