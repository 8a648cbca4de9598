#pragma once

#include <ATen/core/Tensor.h>

#include "engine/device/device.h"

namespace ht::engine {

// y = x / sqrt(mean(x²) + eps) · weight over the last dimension: RMSNorm (Zhang and Sennrich 2019), transformers'
// LlamaRMSNorm. x (T, n) contiguous, weight (n), in the device's compute dtype. `rstd` receives 1 / sqrt(…), (T)
// float32.
at::Tensor rms_norm_forward(const Device& device, const at::Tensor& x, const at::Tensor& weight, double eps,
                            at::Tensor& rstd);
// The same y from a stored rstd.
at::Tensor rms_norm_apply(const Device& device, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd);
// dx += d(loss)/dx given dy (T, n). The weight is frozen.
void rms_norm_backward(const Device& device, const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                       const at::Tensor& rstd, at::Tensor& dx);

// y as the formula reads, in x's dtype.
at::Tensor rms_norm_reference(const at::Tensor& x, const at::Tensor& weight, double eps);

}  // namespace ht::engine
