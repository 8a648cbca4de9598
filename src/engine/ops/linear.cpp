#include "engine/ops/linear.h"

#include <ATen/ATen.h>

#include "engine/ops/skinny_gemm.h"

namespace ht::engine {

at::Tensor linear_forward(const BaseLinear& linear, const at::Tensor& x) {
  if (is_skinny(x)) {
    at::Tensor out = at::empty({x.size(0), linear.weight.size(0)}, x.options());
    skinny_gemm(x, linear.weight, linear.bias, {}, 1.0f, out);
    return out;
  }
  if (linear.bias.defined()) return at::addmm(linear.bias, x, linear.weight.t());
  return at::mm(x, linear.weight.t());
}

void linear_forward_out(const BaseLinear& linear, const at::Tensor& x, at::Tensor& out) {
  if (is_skinny(x)) {
    skinny_gemm(x, linear.weight, linear.bias, {}, 1.0f, out);
  } else if (linear.bias.defined()) {
    at::addmm_out(out, linear.bias, x, linear.weight.t());
  } else {
    at::mm_out(out, x, linear.weight.t());
  }
}

at::Tensor linear_forward_residual(const BaseLinear& linear, const at::Tensor& x, const at::Tensor& residual) {
  if (is_skinny(x)) {
    at::Tensor out = at::empty({x.size(0), linear.weight.size(0)}, x.options());
    skinny_gemm(x, linear.weight, linear.bias, residual, 1.0f, out);
    return out;
  }
  at::Tensor out = at::addmm(residual, x, linear.weight.t());
  if (linear.bias.defined()) out.add_(linear.bias);
  return out;
}

at::Tensor linear_backward(const BaseLinear& linear, const at::Tensor& dy) { return at::mm(dy, linear.weight); }

void linear_backward_out(const BaseLinear& linear, const at::Tensor& dy, at::Tensor& out) {
  at::mm_out(out, dy, linear.weight);
}

}  // namespace ht::engine
