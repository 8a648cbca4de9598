#pragma once

#include <ATen/core/Tensor.h>

#include "engine/device/device.h"

namespace ht::engine {

// silu(gate) · up (Shazeer 2020): gate_up (T, 2 n) holds gate then up, the result is (T, n). Contiguous, in the
// device's compute dtype.
at::Tensor swiglu_forward(const Device& device, const at::Tensor& gate_up);
// Overwrites gate_up by its gradient, given dact (T, n).
void swiglu_backward(const Device& device, const at::Tensor& dact, at::Tensor& gate_up);

// The forward as the formula reads, in gate_up's dtype.
at::Tensor swiglu_reference(const at::Tensor& gate_up);

}  // namespace ht::engine
