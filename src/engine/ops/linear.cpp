#include "engine/ops/linear.h"

#include <ATen/ATen.h>

#include <atomic>

#include "engine/ops/parallel_rows.h"
#include "engine/ops/skinny_gemm.h"

namespace ht::engine {

namespace {

const at::Tensor& skinny_weight(const BaseLinear& linear) {
  return linear.weight16.defined() ? linear.weight16 : linear.weight;
}

// `weight` as T, or undefined if a value would change.
template <class T>
at::Tensor narrowed(const at::Tensor& weight, at::ScalarType type) {
  at::Tensor result = at::empty(weight.sizes(), type);
  const float* from = weight.const_data_ptr<float>();
  T* to = result.data_ptr<T>();
  std::atomic<bool> exact = true;
  parallel_rows(weight.size(0), weight.size(1), [&](std::int64_t begin, std::int64_t end) {
    if (!exact) return;
    bool same = true;
    for (std::int64_t i = begin * weight.size(1); i < end * weight.size(1); ++i) {
      to[i] = static_cast<T>(from[i]);
      same &= static_cast<float>(to[i]) == from[i];
    }
    if (!same) exact = false;
  });
  return exact ? result : at::Tensor();
}

}  // namespace

void keep_16_bits(BaseLinear& linear) {
  linear.weight16 = narrowed<at::BFloat16>(linear.weight, at::kBFloat16);
  if (!linear.weight16.defined()) linear.weight16 = narrowed<at::Half>(linear.weight, at::kHalf);
}

at::Tensor linear_forward(const BaseLinear& linear, const at::Tensor& x) {
  if (is_skinny(x)) {
    at::Tensor out = at::empty({x.size(0), linear.weight.size(0)}, x.options());
    skinny_gemm(x, skinny_weight(linear), linear.bias, {}, 1.0f, out);
    return out;
  }
  if (linear.bias.defined()) return at::addmm(linear.bias, x, linear.weight.t());
  return at::mm(x, linear.weight.t());
}

void linear_forward_out(const BaseLinear& linear, const at::Tensor& x, at::Tensor& out) {
  if (is_skinny(x)) {
    skinny_gemm(x, skinny_weight(linear), linear.bias, {}, 1.0f, out);
  } else if (linear.bias.defined()) {
    at::addmm_out(out, linear.bias, x, linear.weight.t());
  } else {
    at::mm_out(out, x, linear.weight.t());
  }
}

at::Tensor linear_forward_residual(const BaseLinear& linear, const at::Tensor& x, const at::Tensor& residual) {
  if (is_skinny(x)) {
    at::Tensor out = at::empty({x.size(0), linear.weight.size(0)}, x.options());
    skinny_gemm(x, skinny_weight(linear), linear.bias, residual, 1.0f, out);
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
