#include "engine/ops/rms_norm.h"

#include <ATen/ATen.h>

#include "engine/ops/parallel_rows.h"

namespace ht::engine {

at::Tensor rms_norm_forward(const Device& device, const at::Tensor& x, const at::Tensor& weight, double eps,
                            at::Tensor& rstd) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = x.size(0), n = x.size(1);
  at::Tensor y = at::empty_like(x);
  rstd = at::empty({rows}, device.float_options());
  const void* xp = x.const_data_ptr();
  const void* wp = weight.const_data_ptr();
  void* yp = y.data_ptr();
  float* rp = rstd.data_ptr<float>();
  launch_rows(kernels, rows, n, [&](std::int64_t begin, std::int64_t end) {
    kernels.rms_norm_forward(device.stream(), xp, wp, yp, rp, n, static_cast<float>(eps), begin, end);
  });
  return y;
}

at::Tensor rms_norm_apply(const Device& device, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = x.size(0), n = x.size(1);
  at::Tensor y = at::empty_like(x);
  const void* xp = x.const_data_ptr();
  const void* wp = weight.const_data_ptr();
  const float* rp = rstd.const_data_ptr<float>();
  void* yp = y.data_ptr();
  launch_rows(kernels, rows, n, [&](std::int64_t begin, std::int64_t end) {
    kernels.rms_norm_apply(device.stream(), xp, wp, rp, yp, n, begin, end);
  });
  return y;
}

void rms_norm_backward(const Device& device, const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                       const at::Tensor& rstd, at::Tensor& dx) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = x.size(0), n = x.size(1);
  const void* dyp = dy.const_data_ptr();
  const void* xp = x.const_data_ptr();
  const void* wp = weight.const_data_ptr();
  const float* rp = rstd.const_data_ptr<float>();
  void* dxp = dx.data_ptr();
  launch_rows(kernels, rows, n, [&](std::int64_t begin, std::int64_t end) {
    kernels.rms_norm_backward(device.stream(), dyp, xp, wp, rp, dxp, n, begin, end);
  });
}

at::Tensor rms_norm_reference(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return x * (x.square().mean(-1, true) + eps).rsqrt() * weight.to(x.dtype());
}

}  // namespace ht::engine
