#pragma once

#include <ATen/core/Tensor.h>

namespace ht::engine {

// GEMMs with few rows go to kernels/cpu/decode_kernels.h, which reads the weight once at memory speed.

// True when x (M, K) has few enough rows and is what skinny_gemm takes: float32 in host memory, rows contiguous inside.
bool is_skinny(const at::Tensor& x);

// out = alpha · x Wᵀ + bias + residual: x (M, K), weight (N, K) contiguous, float32; bias (N) or undefined, residual
// (M, N) or undefined, which may be `out`; out (M, N), rows may be strided. Each row's bits do not depend on the other
// rows.
void skinny_gemm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& residual,
                 float alpha, const at::Tensor& out);

}  // namespace ht::engine
