#include "engine/ops/linear.h"

#include <ATen/ATen.h>

#include "engine/ops/parallel_rows.h"
#include "engine/ops/skinny_gemm.h"

namespace ht::engine {

namespace {

// out = x Wᵀ + bias + residual for few rows.
void few_rows(const BaseLinear& linear, const at::Tensor& x, const at::Tensor& residual, const at::Tensor& out) {
  if (!linear.packed.defined()) return skinny_gemm(x, linear.weight, linear.bias, residual, 1.0f, out);
  HtPanelGemm gemm = panel_gemm(linear.packed, x.const_data_ptr<float>(), x.stride(0), x.size(0), out.data_ptr<float>(),
                                out.stride(0));
  if (linear.bias.defined()) gemm.bias = linear.bias.const_data_ptr<float>();
  if (residual.defined()) {
    gemm.residual = residual.const_data_ptr<float>();
    gemm.ld_residual = residual.stride(0);
  }
  parallel_rows(linear.packed.panels(), gemm.m * gemm.k,
                [&](std::int64_t begin, std::int64_t end) { ht_panel_gemm(&gemm, begin, end); });
}

}  // namespace

at::Tensor linear_forward(const BaseLinear& linear, const at::Tensor& x) {
  if (is_skinny(x)) {
    at::Tensor out = at::empty({x.size(0), linear.weight.size(0)}, x.options());
    few_rows(linear, x, {}, out);
    return out;
  }
  if (linear.bias.defined()) return at::addmm(linear.bias, x, linear.weight.t());
  return at::mm(x, linear.weight.t());
}

void linear_forward_out(const BaseLinear& linear, const at::Tensor& x, at::Tensor& out) {
  if (is_skinny(x)) {
    few_rows(linear, x, {}, out);
  } else if (out.dtype() != x.dtype()) {
    add_product(out, x, linear.weight.t(), 0.0, 1.0);
    if (linear.bias.defined()) out.add_(linear.bias);
  } else if (linear.bias.defined()) {
    at::addmm_out(out, linear.bias, x, linear.weight.t());
  } else {
    at::mm_out(out, x, linear.weight.t());
  }
}

at::Tensor linear_forward_residual(const BaseLinear& linear, const at::Tensor& x, const at::Tensor& residual) {
  if (is_skinny(x)) {
    at::Tensor out = at::empty({x.size(0), linear.weight.size(0)}, x.options());
    few_rows(linear, x, residual, out);
    return out;
  }
  at::Tensor out = at::addmm(residual, x, linear.weight.t());
  if (linear.bias.defined()) out.add_(linear.bias);
  return out;
}

at::Tensor linear_backward(const BaseLinear& linear, const at::Tensor& dy) {
  return at::mm(dy, linear.weight);
}

void linear_backward_out(const BaseLinear& linear, const at::Tensor& dy, at::Tensor& out) {
  at::mm_out(out, dy, linear.weight);
}

void add_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, double alpha) {
  if (out.dtype() == a.dtype()) {
    out.addmm_(a, b, beta, alpha);
  } else if (a.is_cpu()) {  // ATen's CPU GEMMs have no wider result
    out.addmm_(a.to(out.dtype()), b.to(out.dtype()), beta, alpha);
  } else {
    at::addmm_out(out, out, a, b, out.scalar_type(), beta, alpha);
  }
}

}  // namespace ht::engine
