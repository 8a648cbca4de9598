#include "engine/layers/mlp.h"

#include <ATen/ATen.h>

#include "engine/layers/lora_linear.h"
#include "engine/ops/lora.h"
#include "engine/ops/swiglu.h"

namespace ht::engine {

at::Tensor Mlp::forward(const at::Tensor& x, const at::Tensor& residual, const BlockContext& context,
                        Saved* saved) const {
  const LoraView lora_up = LoraView::of_layer(context.segments, layer, LoraSlot::gate_up);
  const LoraView lora_down = LoraView::of_layer(context.segments, layer, LoraSlot::down);
  at::Tensor projected = lora_linear_forward(gate_up, lora_up, x, saved ? &saved->u_gate_up : nullptr);
  at::Tensor act = swiglu_forward(context.device, projected);
  at::Tensor y = lora_linear_forward_residual(down, lora_down, act, residual, saved ? &saved->u_down : nullptr);
  if (saved != nullptr) {
    saved->gate_up = std::move(projected);
    saved->act = std::move(act);
  }
  return y;
}

void Mlp::recompute(const at::Tensor& x, const BlockContext& context, Saved& saved) const {
  const LoraView lora_up = LoraView::of_layer(context.segments, layer, LoraSlot::gate_up);
  saved.gate_up = lora_linear_forward(gate_up, lora_up, x, &saved.u_gate_up);
  saved.act = swiglu_forward(context.device, saved.gate_up);
  const LoraView lora_down = LoraView::of_layer(context.segments, layer, LoraSlot::down);
  if (saved.u_down.empty()) saved.u_down = lora_project(lora_down, saved.act);
}

at::Tensor Mlp::backward(const at::Tensor& dy, const at::Tensor& x, const BlockContext& context, Saved& saved) const {
  const LoraView lora_up = LoraView::of_layer(context.segments, layer, LoraSlot::gate_up);
  const LoraView lora_down = LoraView::of_layer(context.segments, layer, LoraSlot::down);
  const at::Tensor dact = lora_linear_backward(down, lora_down, saved.act, saved.u_down, dy);
  swiglu_backward(context.device, dact, saved.gate_up);
  at::Tensor dx = lora_linear_backward(gate_up, lora_up, x, saved.u_gate_up, saved.gate_up);
  saved = Saved{};
  return dx;
}

}  // namespace ht::engine
