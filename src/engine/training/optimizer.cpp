#include "engine/training/optimizer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "engine/ops/parallel_rows.h"

namespace ht::engine {

namespace {
constexpr std::int64_t kBlock = 1 << 15;
}

double global_norm(const Device& device, const at::Tensor& flat) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t n = flat.numel(), blocks = (n + kBlock - 1) / kBlock;
  const float* x = flat.const_data_ptr<float>();
  const at::Tensor sums = at::empty({blocks}, flat.options().dtype(at::kDouble));
  launch_rows(kernels, blocks, kBlock, [&, to = sums.data_ptr<double>()](std::int64_t begin, std::int64_t end) {
    kernels.sum_of_squares(device.stream(), x, n, kBlock, to, begin, end);
  });
  const at::Tensor host = sums.cpu();
  double total = 0;
  for (std::int64_t b = 0; b < blocks; ++b) total += host.const_data_ptr<double>()[b];
  return std::sqrt(total);
}

void adamw_step(const Device& device, Adapter& adapter, const worker_protocol::AdamParams& params, double grad_norm) {
  ++adapter.step;
  const double t = static_cast<double>(adapter.step);
  HtAdamW a{};
  a.grad_scale = 1.0f;
  if (params.grad_clip_norm > 0) {
    a.grad_scale = static_cast<float>(std::min(1.0, params.grad_clip_norm / (grad_norm + 1e-6)));
  }
  a.decay = static_cast<float>(1.0 - params.learning_rate * params.weight_decay);
  a.one_minus_beta1 = static_cast<float>(1.0 - params.beta1);
  a.beta2 = static_cast<float>(params.beta2);
  a.one_minus_beta2 = static_cast<float>(1.0 - params.beta2);
  a.step_size = static_cast<float>(params.learning_rate / (1.0 - std::pow(params.beta1, t)));
  a.bias2 = static_cast<float>(std::sqrt(1.0 - std::pow(params.beta2, t)));
  a.eps = static_cast<float>(params.eps);
  float* p = adapter.weights.flat.data_ptr<float>();
  const float* g = adapter.grad.const_data_ptr<float>();
  float* m = adapter.exp_avg.data_ptr<float>();
  float* v = adapter.exp_avg_sq.data_ptr<float>();
  const HtKernelTable& kernels = device.kernels();
  launch_rows(kernels, adapter.grad.numel(), 1, [&](std::int64_t begin, std::int64_t end) {
    kernels.adamw(device.stream(), p, g, m, v, &a, begin, end);
  });
}

}  // namespace ht::engine
