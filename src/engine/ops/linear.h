#pragma once

#include <ATen/core/Tensor.h>

#include "engine/ops/packed_weight.h"

namespace ht::engine {

// A frozen linear of the base model: y = x Wᵀ + bias. Every GEMM against a base weight goes through the functions
// below.
struct BaseLinear {
  at::Tensor weight;  // (out, in), contiguous, in the device's compute dtype
  at::Tensor bias;    // (out); undefined: none
  // The same values in the checkpoint's 16 bits, for products with few rows. Undefined where 16 bits do not hold the
  // values exactly: those products then read `weight`.
  PackedWeight packed;
};

// x (M, in) -> (M, out).
at::Tensor linear_forward(const BaseLinear& linear, const at::Tensor& x);
// The same into `out` (M, out), contiguous: a reused buffer saves the page faults of a large result. A float32 `out`
// gets the product of lower-precision factors unrounded (the head's logits).
void linear_forward_out(const BaseLinear& linear, const at::Tensor& x, at::Tensor& out);
// residual + linear(x), a new tensor (M, out).
at::Tensor linear_forward_residual(const BaseLinear& linear, const at::Tensor& x, const at::Tensor& residual);
// dx (M, in) = dy (M, out) W. The base is frozen: there is no gradient of W.
at::Tensor linear_backward(const BaseLinear& linear, const at::Tensor& dy);
// dx is written into `out` (M, in).
void linear_backward_out(const BaseLinear& linear, const at::Tensor& dy, at::Tensor& out);

// out = beta out + alpha a b, accumulated in float32 and rounded once to out's dtype, which is that of a and b or
// float32.
void add_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, double alpha);

}  // namespace ht::engine
