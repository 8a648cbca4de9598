#include "engine/ops/rms_norm.h"

#include <ATen/ATen.h>

#include "engine/ops/parallel_rows.h"
#include "kernels/cpu/train_kernels.h"

namespace ht::engine {

at::Tensor rms_norm_forward(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor& rstd) {
  const std::int64_t rows = x.size(0), n = x.size(1);
  at::Tensor y = at::empty_like(x);
  rstd = at::empty({rows}, x.options());
  const float* xp = x.const_data_ptr<float>();
  const float* wp = weight.const_data_ptr<float>();
  float* yp = y.data_ptr<float>();
  float* rp = rstd.data_ptr<float>();
  parallel_rows(rows, n, [&](std::int64_t begin, std::int64_t end) {
    ht_rms_norm_forward(xp, wp, yp, rp, n, static_cast<float>(eps), begin, end);
  });
  return y;
}

at::Tensor rms_norm_apply(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd) {
  const std::int64_t rows = x.size(0), n = x.size(1);
  at::Tensor y = at::empty_like(x);
  const float* xp = x.const_data_ptr<float>();
  const float* wp = weight.const_data_ptr<float>();
  const float* rp = rstd.const_data_ptr<float>();
  float* yp = y.data_ptr<float>();
  parallel_rows(rows, n,
                [&](std::int64_t begin, std::int64_t end) { ht_rms_norm_apply(xp, wp, rp, yp, n, begin, end); });
  return y;
}

void rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd,
                       at::Tensor& dx) {
  const std::int64_t rows = x.size(0), n = x.size(1);
  const float* dyp = dy.const_data_ptr<float>();
  const float* xp = x.const_data_ptr<float>();
  const float* wp = weight.const_data_ptr<float>();
  const float* rp = rstd.const_data_ptr<float>();
  float* dxp = dx.data_ptr<float>();
  parallel_rows(rows, n, [&](std::int64_t begin, std::int64_t end) {
    ht_rms_norm_backward(dyp, xp, wp, rp, dxp, n, begin, end);
  });
}

}  // namespace ht::engine
