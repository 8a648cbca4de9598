#pragma once

#include <ATen/core/Tensor.h>

namespace ht::engine {

// y = x / sqrt(mean(x²) + eps) · weight over the last dimension: RMSNorm (Zhang and Sennrich 2019), transformers'
// LlamaRMSNorm. x (T, n) contiguous float32, weight (n). `rstd` receives 1 / sqrt(…), (T).
at::Tensor rms_norm_forward(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor& rstd);
// The same y from a stored rstd.
at::Tensor rms_norm_apply(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd);
// dx += d(loss)/dx given dy (T, n). The weight is frozen.
void rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd,
                       at::Tensor& dx);

}  // namespace ht::engine
