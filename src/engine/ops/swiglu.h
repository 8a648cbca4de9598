#pragma once

#include <ATen/core/Tensor.h>

namespace ht::engine {

// silu(gate) · up (Shazeer 2020): gate_up (T, 2 n) holds gate then up, the result is (T, n). Contiguous float32.
at::Tensor swiglu_forward(const at::Tensor& gate_up);
// Overwrites gate_up by its gradient, given dact (T, n).
void swiglu_backward(const at::Tensor& dact, at::Tensor& gate_up);

}  // namespace ht::engine
