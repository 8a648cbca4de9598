#include "engine/training/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/train_kernels.h"

namespace ht::engine {

namespace {
constexpr std::int64_t kBlock = 1 << 15;
}

double global_norm(const at::Tensor& flat) {
  const std::int64_t n = flat.numel(), blocks = (n + kBlock - 1) / kBlock;
  const float* x = flat.const_data_ptr<float>();
  std::vector<double> sums(static_cast<std::size_t>(blocks));
  at::parallel_for(0, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      sums[static_cast<std::size_t>(b)] = ht_sum_of_squares(x, b * kBlock, std::min(n, (b + 1) * kBlock));
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

void adamw_step(Adapter& adapter, const worker_protocol::AdamParams& params, double grad_norm) {
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
  at::parallel_for(0, adapter.grad.numel(), kBlock,
                   [&](std::int64_t begin, std::int64_t end) { ht_adamw(p, g, m, v, &a, begin, end); });
}

}  // namespace ht::engine
