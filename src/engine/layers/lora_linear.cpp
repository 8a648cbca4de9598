#include "engine/layers/lora_linear.h"

#include <ATen/ATen.h>

#include "engine/ops/lora.h"

namespace ht::engine {

namespace {

void add_lora(const LoraView& lora, const at::Tensor& x, at::Tensor& y, std::vector<at::Tensor>* u) {
  std::vector<at::Tensor> saved = lora_forward(lora, x, y);
  if (u != nullptr) *u = std::move(saved);
}

}  // namespace

at::Tensor lora_linear_forward(const BaseLinear& linear, const LoraView& lora, const at::Tensor& x,
                               std::vector<at::Tensor>* u) {
  at::Tensor y = linear_forward(linear, x);
  add_lora(lora, x, y, u);
  return y;
}

at::Tensor lora_linear_forward_residual(const BaseLinear& linear, const LoraView& lora, const at::Tensor& x,
                                        const at::Tensor& residual, std::vector<at::Tensor>* u) {
  at::Tensor y = linear_forward_residual(linear, x, residual);
  add_lora(lora, x, y, u);
  return y;
}

at::Tensor lora_linear_backward(const BaseLinear& linear, const LoraView& lora, const at::Tensor& x,
                                const std::vector<at::Tensor>& u, const at::Tensor& dy, bool need_dx) {
  at::Tensor dx;
  if (need_dx) dx = linear_backward(linear, dy);
  lora_backward(lora, x, u, dy, dx);
  return dx;
}

}  // namespace ht::engine
