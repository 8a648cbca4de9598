#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine/ops/linear.h"
#include "engine/ops/views.h"

namespace ht::engine {

// A frozen linear with the adapters' LoRA on it: y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ per segment.
// `u` receives x Aᵀ per segment for the backward; nullptr: inference.
at::Tensor lora_linear_forward(const BaseLinear& linear, const LoraView& lora, const at::Tensor& x,
                               std::vector<at::Tensor>* u);
// residual + the same.
at::Tensor lora_linear_forward_residual(const BaseLinear& linear, const LoraView& lora, const at::Tensor& x,
                                        const at::Tensor& residual, std::vector<at::Tensor>* u);
// dx (T, in); adds the LoRA gradients. With `need_dx` false only the LoRA gradients are computed and the result is
// undefined.
at::Tensor lora_linear_backward(const BaseLinear& linear, const LoraView& lora, const at::Tensor& x,
                                const std::vector<at::Tensor>& u, const at::Tensor& dy, bool need_dx = true);

}  // namespace ht::engine
