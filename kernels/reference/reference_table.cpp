#include "kernels/reference/reference_table.h"

#include <math.h>

#include <vector>

#include "kernels/bfloat16.h"

namespace {

using ht::kernels::Bf16;

// A pointer whose elements read and write as double.
template <typename T>
struct Array {
  T* data;

  double operator[](int64_t i) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return data[i];
    } else {
      return ht::kernels::to_float(data[i]);
    }
  }
  void set(int64_t i, double value) const {
    const auto rounded = static_cast<float>(value);
    if constexpr (sizeof(T) == sizeof(float)) {
      data[i] = rounded;
    } else {
      data[i] = ht::kernels::to_bf16(rounded);
    }
  }
};

template <typename T>
Array<const T> in(const void* p, int64_t offset = 0) {
  return {static_cast<const T*>(p) + offset};
}
template <typename T>
Array<T> out(void* p, int64_t offset = 0) {
  return {static_cast<T*>(p) + offset};
}

template <typename T>
float inverse_rms(Array<const T> x, int64_t n, float eps) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += x[j] * x[j];
  return static_cast<float>(1.0 / sqrt(sum / static_cast<double>(n) + eps));
}

template <typename T>
void rms_norm_apply(HtStream, const void* x, const void* weight, const float* rstd, void* y, int64_t n, int64_t begin,
                    int64_t end) {
  const auto w = in<T>(weight);
  for (int64_t row = begin; row < end; ++row) {
    const auto xr = in<T>(x, row * n);
    const auto yr = out<T>(y, row * n);
    for (int64_t j = 0; j < n; ++j) yr.set(j, w[j] * xr[j] * rstd[row]);
  }
}

template <typename T>
void rms_norm_forward(HtStream stream, const void* x, const void* weight, void* y, float* rstd, int64_t n, float eps,
                      int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) rstd[row] = inverse_rms(in<T>(x, row * n), n, eps);
  rms_norm_apply<T>(stream, x, weight, rstd, y, n, begin, end);
}

template <typename T>
void rms_norm_backward(HtStream, const void* dy, const void* x, const void* weight, const float* rstd, void* dx,
                       int64_t n, int64_t begin, int64_t end) {
  const auto w = in<T>(weight);
  for (int64_t row = begin; row < end; ++row) {
    const auto dyr = in<T>(dy, row * n), xr = in<T>(x, row * n);
    const auto dxr = out<T>(dx, row * n);
    const double r = rstd[row];
    double dot = 0;
    for (int64_t j = 0; j < n; ++j) dot += dyr[j] * w[j] * xr[j];
    const double c = dot * r * r / static_cast<double>(n);
    for (int64_t j = 0; j < n; ++j) dxr.set(j, dxr[j] + r * (dyr[j] * w[j] - c * xr[j]));
  }
}

template <typename T>
void norm_rope_forward(HtStream, const HtNormRope* rope, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                       float* rstd, int64_t begin, int64_t end) {
  const int64_t dim = rope->head_dim, half = dim / 2;
  std::vector<double> head(static_cast<size_t>(dim));
  for (int64_t row = begin; row < end; ++row) {
    const float* c = rope->cos + row * half;
    const float* s = rope->sin + row * half;
    for (int64_t h = 0; h < rope->heads; ++h) {
      const auto xh = in<T>(x, row * x_stride + h * dim);
      const auto yh = out<T>(y, row * y_stride + h * dim);
      for (int64_t j = 0; j < dim; ++j) head[static_cast<size_t>(j)] = xh[j];
      if (rope->weight != nullptr) {
        const float r = rstd[row * rope->heads + h] = inverse_rms(xh, dim, rope->eps);
        for (int64_t j = 0; j < dim; ++j) head[static_cast<size_t>(j)] *= in<T>(rope->weight)[j] * r;
      }
      for (int64_t j = 0; j < half; ++j) {
        const double a = head[static_cast<size_t>(j)], b = head[static_cast<size_t>(j + half)];
        yh.set(j, a * c[j] - b * s[j]);
        yh.set(j + half, b * c[j] + a * s[j]);
      }
    }
  }
}

template <typename T>
void norm_rope_backward(HtStream, const HtNormRope* rope, void* d, int64_t stride, const void* x, int64_t x_stride,
                        const float* rstd, int64_t begin, int64_t end) {
  const int64_t dim = rope->head_dim, half = dim / 2;
  std::vector<double> dx(static_cast<size_t>(dim));
  for (int64_t row = begin; row < end; ++row) {
    const float* c = rope->cos + row * half;
    const float* s = rope->sin + row * half;
    for (int64_t h = 0; h < rope->heads; ++h) {
      const auto dh = out<T>(d, row * stride + h * dim);
      for (int64_t j = 0; j < half; ++j) {
        const double a = dh[j], b = dh[j + half];
        dx[static_cast<size_t>(j)] = a * c[j] + b * s[j];
        dx[static_cast<size_t>(j + half)] = b * c[j] - a * s[j];
      }
      if (rope->weight != nullptr) {
        const auto xh = in<T>(x, row * x_stride + h * dim), w = in<T>(rope->weight);
        const double r = rstd[row * rope->heads + h];
        double dot = 0;
        for (int64_t j = 0; j < dim; ++j) dot += dx[static_cast<size_t>(j)] * w[j] * xh[j];
        const double k = dot * r * r / static_cast<double>(dim);
        for (int64_t j = 0; j < dim; ++j) {
          double& value = dx[static_cast<size_t>(j)];
          value = r * (value * w[j] - k * xh[j]);
        }
      }
      for (int64_t j = 0; j < dim; ++j) dh.set(j, dx[static_cast<size_t>(j)]);
    }
  }
}

template <typename T>
void swiglu_forward(HtStream, const void* gate_up, void* act, int64_t n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto g = in<T>(gate_up, row * 2 * n), u = in<T>(gate_up, row * 2 * n + n);
    for (int64_t j = 0; j < n; ++j) out<T>(act, row * n).set(j, g[j] / (1.0 + exp(-g[j])) * u[j]);
  }
}

template <typename T>
void swiglu_backward(HtStream, const void* dact, void* gate_up, int64_t n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto dy = in<T>(dact, row * n);
    const auto g = out<T>(gate_up, row * 2 * n), u = out<T>(gate_up, row * 2 * n + n);
    for (int64_t j = 0; j < n; ++j) {
      const double sigmoid = 1.0 / (1.0 + exp(-g[j])), silu = g[j] * sigmoid;
      const double dg = dy[j] * u[j] * (sigmoid + silu * (1.0 - sigmoid));
      u.set(j, dy[j] * silu);
      g.set(j, dg);
    }
  }
}

void logsumexp(HtStream, const float* logits, int64_t vocab, float* lse, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = logits + row * vocab;
    double max = x[0], sum = 0;
    for (int64_t j = 1; j < vocab; ++j) max = x[j] > max ? x[j] : max;
    for (int64_t j = 0; j < vocab; ++j) sum += exp(x[j] - max);
    lse[row] = static_cast<float>(max + log(sum));
  }
}

void gather_logprobs(HtStream, const float* logits, int64_t vocab, const float* lse, const HtTargets* t,
                     float* logprobs, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t k = t->offsets[row]; k < t->offsets[row + 1]; ++k) {
      logprobs[k] = logits[row * vocab + t->targets[k]] - lse[row];
    }
  }
}

template <typename T>
void dlogits(HtStream, const float* logits, void* dlogits, int64_t vocab, const float* lse, const HtTargets* t,
             const float* dlogprobs, int64_t begin, int64_t end) {
  std::vector<double> d(static_cast<size_t>(vocab));
  for (int64_t row = begin; row < end; ++row) {
    double total = 0;
    bool any = false;
    for (int64_t k = t->offsets[row]; k < t->offsets[row + 1]; ++k) {
      total += dlogprobs[k];
      any = any || dlogprobs[k] != 0.0f;
    }
    for (int64_t j = 0; j < vocab; ++j) {
      d[static_cast<size_t>(j)] = any ? -total * exp(static_cast<double>(logits[row * vocab + j]) - lse[row]) : 0.0;
    }
    for (int64_t k = t->offsets[row]; any && k < t->offsets[row + 1]; ++k) {
      d[static_cast<size_t>(t->targets[k])] += dlogprobs[k];
    }
    for (int64_t j = 0; j < vocab; ++j) out<T>(dlogits, row * vocab).set(j, d[static_cast<size_t>(j)]);
  }
}

void adamw(HtStream, float* p, const float* grad, float* m, float* v, const HtAdamW* a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const double g = static_cast<double>(grad[i]) * a->grad_scale;
    const double mi = m[i] + a->one_minus_beta1 * (g - m[i]);
    const double vi = static_cast<double>(v[i]) * a->beta2 + a->one_minus_beta2 * g * g;
    const double update = mi == 0.0 ? 0.0 : mi / (sqrt(vi) / a->bias2 + a->eps);
    m[i] = static_cast<float>(mi);
    v[i] = static_cast<float>(vi);
    p[i] = static_cast<float>(static_cast<double>(p[i]) * a->decay - a->step_size * update);
  }
}

void sum_of_squares(HtStream, const float* x, int64_t n, int64_t size, double* sums, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    sums[b] = 0;
    for (int64_t i = b * size; i < n && i < (b + 1) * size; ++i) sums[b] += static_cast<double>(x[i]) * x[i];
  }
}

template <typename T>
constexpr HtKernelTable table(const char* name, HtDType dtype) {
  return {.name = name,
          .dtype = dtype,
          .host_threads = 1,
          .rms_norm_forward = rms_norm_forward<T>,
          .rms_norm_apply = rms_norm_apply<T>,
          .rms_norm_backward = rms_norm_backward<T>,
          .norm_rope_forward = norm_rope_forward<T>,
          .norm_rope_backward = norm_rope_backward<T>,
          .swiglu_forward = swiglu_forward<T>,
          .swiglu_backward = swiglu_backward<T>,
          .logsumexp = logsumexp,
          .gather_logprobs = gather_logprobs,
          .dlogits = dlogits<T>,
          .adamw = adamw,
          .sum_of_squares = sum_of_squares};
}

constexpr HtKernelTable kFloat = table<float>("reference float32", HT_F32);
constexpr HtKernelTable kBf16 = table<Bf16>("reference bfloat16", HT_BF16);

}  // namespace

const HtKernelTable* ht_reference_kernels(HtDType dtype) {
  return dtype == HT_BF16 ? &kBf16 : &kFloat;
}
