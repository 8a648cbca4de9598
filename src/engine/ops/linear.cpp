#include "engine/ops/linear.h"

#include <ATen/ATen.h>

namespace ht::engine {

at::Tensor linear_forward(const BaseLinear& linear, const at::Tensor& x) {
  if (linear.bias.defined()) return at::addmm(linear.bias, x, linear.weight.t());
  return at::mm(x, linear.weight.t());
}

void linear_forward_out(const BaseLinear& linear, const at::Tensor& x, at::Tensor& out) {
  if (linear.bias.defined()) {
    at::addmm_out(out, linear.bias, x, linear.weight.t());
  } else {
    at::mm_out(out, x, linear.weight.t());
  }
}

at::Tensor linear_forward_residual(const BaseLinear& linear, const at::Tensor& x, const at::Tensor& residual) {
  at::Tensor out = at::addmm(residual, x, linear.weight.t());
  if (linear.bias.defined()) out.add_(linear.bias);
  return out;
}

at::Tensor linear_backward(const BaseLinear& linear, const at::Tensor& dy) { return at::mm(dy, linear.weight); }

void linear_backward_out(const BaseLinear& linear, const at::Tensor& dy, at::Tensor& out) {
  at::mm_out(out, dy, linear.weight);
}

}  // namespace ht::engine
