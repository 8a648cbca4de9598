#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine/ops/views.h"

namespace ht::engine {

// y[segment] += scale · (x[segment] Aᵀ) Bᵀ for every segment with LoRA on this linear, in place.
//   x (T, in), y (T, out), contiguous, in the factors' dtype; y may be float32 (the logits). Returns u = x Aᵀ per
//   segment (undefined where there is no LoRA), which lora_backward needs. LoRA: Hu et al. 2021, equation 3; peft's
//   LoraLayer.forward with scaling = alpha / r.
std::vector<at::Tensor> lora_forward(const LoraView& lora, const at::Tensor& x, at::Tensor& y);

// u alone: x Aᵀ per segment.
std::vector<at::Tensor> lora_project(const LoraView& lora, const at::Tensor& x);

// Given dy (T, out): dx[segment] += scale · (dy B) A in place (an undefined dx is left out), and the gradients of A and
// B are added into the factors' grad_a and grad_b (skipped where these are undefined). `u` is what lora_forward
// returned.
void lora_backward(const LoraView& lora, const at::Tensor& x, const std::vector<at::Tensor>& u, const at::Tensor& dy,
                   at::Tensor& dx);

}  // namespace ht::engine
