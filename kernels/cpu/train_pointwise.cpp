#include <math.h>
#include <string.h>

#include "kernels/cpu/train_kernels.h"
#include "kernels/cpu/vector_math.h"

using ht::kernels::fast_exp;

void ht_swiglu_forward(const float* gate_up, float* act, int64_t n, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* __restrict g = gate_up + row * 2 * n;
    const float* __restrict u = g + n;
    float* __restrict y = act + row * n;
    for (int64_t j = 0; j < n; ++j) y[j] = g[j] / (1.0f + fast_exp(-g[j])) * u[j];
  }
}

void ht_swiglu_backward(const float* dact, float* gate_up, int64_t n, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* __restrict dy = dact + row * n;
    float* __restrict g = gate_up + row * 2 * n;
    float* __restrict u = g + n;
    for (int64_t j = 0; j < n; ++j) {
      const float sigmoid = 1.0f / (1.0f + fast_exp(-g[j]));
      const float silu = g[j] * sigmoid;
      const float dg = dy[j] * u[j] * (sigmoid + silu * (1.0f - sigmoid));
      u[j] = dy[j] * silu;
      g[j] = dg;
    }
  }
}

void ht_logsumexp(const float* logits, int64_t vocab, float* lse, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* __restrict x = logits + row * vocab;
    float max = x[0];
    for (int64_t j = 1; j < vocab; ++j) max = x[j] > max ? x[j] : max;
    // Partial sums bound the rounding error over a large vocabulary, also where the compiler does not vectorise them.
    constexpr int64_t kBlock = 256;
    double total = 0.0;
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
      const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
      float sum = 0.0f;
      for (int64_t j = begin; j < end; ++j) sum += fast_exp(x[j] - max);
      total += sum;
    }
    lse[row] = static_cast<float>(static_cast<double>(max) + log(total));
  }
}

void ht_dlogits(float* logits, int64_t vocab, const float* lse, const int32_t* targets, const float* dlogprobs,
                const int64_t* offsets, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* __restrict x = logits + row * vocab;
    float total = 0.0f;
    bool any = false;
    for (int64_t k = offsets[row]; k < offsets[row + 1]; ++k) {
      total += dlogprobs[k];
      any = any || dlogprobs[k] != 0.0f;
    }
    if (!any) {
      memset(x, 0, static_cast<size_t>(vocab) * sizeof(float));
      continue;
    }
    const float shift = lse[row];
    for (int64_t j = 0; j < vocab; ++j) x[j] = -total * fast_exp(x[j] - shift);
    for (int64_t k = offsets[row]; k < offsets[row + 1]; ++k) x[targets[k]] += dlogprobs[k];
  }
}

void ht_adamw(float* p, const float* grad, float* m, float* v, const HtAdamW* a, int64_t begin, int64_t end) {
  const HtAdamW c = *a;
  for (int64_t i = begin; i < end; ++i) {
    const float g = grad[i] * c.grad_scale;
    const float mi = m[i] + c.one_minus_beta1 * (g - m[i]);
    const float vi = v[i] * c.beta2 + c.one_minus_beta2 * g * g;
    const float denominator = sqrtf(vi) / c.bias2 + c.eps;
    const float update = mi == 0.0f ? 0.0f : mi / denominator;
    m[i] = mi;
    v[i] = vi;
    p[i] = p[i] * c.decay - c.step_size * update;
  }
}

double ht_sum_of_squares(const float* x, int64_t begin, int64_t end) {
  double sum = 0.0;
  for (int64_t i = begin; i < end; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}
