#include <math.h>

#include "kernels/cpu/train_kernels.h"

void ht_rms_norm_forward(const float* x, const float* weight, float* y, float* rstd, int64_t n, float eps,
                         int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* xr = x + row * n;
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) sum += xr[j] * xr[j];
    rstd[row] = 1.0f / sqrtf(sum / static_cast<float>(n) + eps);
  }
  ht_rms_norm_apply(x, weight, rstd, y, n, row_begin, row_end);
}

void ht_rms_norm_apply(const float* x, const float* weight, const float* rstd, float* y, int64_t n, int64_t row_begin,
                       int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* __restrict xr = x + row * n;
    float* __restrict yr = y + row * n;
    const float r = rstd[row];
    for (int64_t j = 0; j < n; ++j) yr[j] = weight[j] * (xr[j] * r);
  }
}

void ht_rms_norm_backward(const float* dy, const float* x, const float* weight, const float* rstd, float* dx, int64_t n,
                          int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* __restrict dyr = dy + row * n;
    const float* __restrict xr = x + row * n;
    float* __restrict dxr = dx + row * n;
    const float r = rstd[row];
    float dot = 0.0f;
    for (int64_t j = 0; j < n; ++j) dot += dyr[j] * weight[j] * xr[j];
    const float c = dot * r * r / static_cast<float>(n);
    for (int64_t j = 0; j < n; ++j) dxr[j] += r * (dyr[j] * weight[j] - c * xr[j]);
  }
}

void ht_norm_rope_forward(const float* in, int64_t in_stride, float* out, int64_t out_stride, const float* cos,
                          const float* sin, const float* norm_weight, float* rstd, float eps, int64_t heads,
                          int64_t head_dim, int64_t row_begin, int64_t row_end) {
  const int64_t half = head_dim / 2;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* __restrict c = cos + row * half;
    const float* __restrict s = sin + row * half;
    for (int64_t head = 0; head < heads; ++head) {
      const float* x = in + row * in_stride + head * head_dim;
      float* y = out + row * out_stride + head * head_dim;
      if (norm_weight == nullptr) {
        for (int64_t j = 0; j < half; ++j) {
          const float a = x[j];
          const float b = x[j + half];
          y[j] = a * c[j] - b * s[j];
          y[j + half] = b * c[j] + a * s[j];
        }
        continue;
      }
      float sum = 0.0f;
      for (int64_t j = 0; j < head_dim; ++j) sum += x[j] * x[j];
      const float r = 1.0f / sqrtf(sum / static_cast<float>(head_dim) + eps);
      rstd[row * heads + head] = r;
      for (int64_t j = 0; j < half; ++j) {
        const float a = norm_weight[j] * (x[j] * r);
        const float b = norm_weight[j + half] * (x[j + half] * r);
        y[j] = a * c[j] - b * s[j];
        y[j + half] = b * c[j] + a * s[j];
      }
    }
  }
}

void ht_norm_rope_backward(const float* dout, int64_t dout_stride, const float* in, int64_t in_stride, const float* cos,
                           const float* sin, const float* norm_weight, const float* rstd, float* din,
                           int64_t din_stride, int64_t heads, int64_t head_dim, int64_t row_begin, int64_t row_end) {
  const int64_t half = head_dim / 2;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* __restrict c = cos + row * half;
    const float* __restrict s = sin + row * half;
    for (int64_t head = 0; head < heads; ++head) {
      const float* dy = dout + row * dout_stride + head * head_dim;
      float* dx = din + row * din_stride + head * head_dim;
      for (int64_t j = 0; j < half; ++j) {  // the inverse rotation
        const float a = dy[j];
        const float b = dy[j + half];
        dx[j] = a * c[j] + b * s[j];
        dx[j + half] = b * c[j] - a * s[j];
      }
      if (norm_weight == nullptr) continue;
      const float* x = in + row * in_stride + head * head_dim;
      const float r = rstd[row * heads + head];
      float dot = 0.0f;
      for (int64_t j = 0; j < head_dim; ++j) dot += dx[j] * norm_weight[j] * x[j];
      const float k = dot * r * r / static_cast<float>(head_dim);
      for (int64_t j = 0; j < head_dim; ++j) dx[j] = r * (dx[j] * norm_weight[j] - k * x[j]);
    }
  }
}
