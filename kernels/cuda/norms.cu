// RMSNorm: a block a row, which is read from memory once and then from L1. Norm and rotation of heads: a warp a head.

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/kernels.h"

namespace ht::cuda {

namespace {

constexpr int kThreads = 256;

// Apply: rstd is given; else it is computed and written.
template <int N, bool Apply>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const bf16* x, const bf16* weight, bf16* y, float* rstd, int64_t n, float eps) {
  const int64_t row = blockIdx.x;
  x += row * n;
  y += row * n;
  float r;
  if constexpr (Apply) {
    r = rstd[row];
  } else {
    float sum = 0.0f;
    for (int64_t j = int64_t{threadIdx.x} * N; j < n; j += kThreads * N) {
      float v[N];
      load(x + j, v);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += v[i] * v[i];
    }
    r = rsqrtf(block_sum<kThreads>(sum) / static_cast<float>(n) + eps);
    if (threadIdx.x == 0) rstd[row] = r;
  }
  for (int64_t j = int64_t{threadIdx.x} * N; j < n; j += kThreads * N) {
    float v[N], w[N];
    load(x + j, v);
    load(weight + j, w);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = w[i] * (v[i] * r);
    store(v, y + j);
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads) rms_norm_backward_kernel(const bf16* dy, const bf16* x, const bf16* weight,
                                                                     const float* rstd, bf16* dx, int64_t n) {
  const int64_t row = blockIdx.x;
  dy += row * n;
  x += row * n;
  dx += row * n;
  float dot = 0.0f;
  for (int64_t j = int64_t{threadIdx.x} * N; j < n; j += kThreads * N) {
    float g[N], v[N], w[N];
    load(dy + j, g);
    load(x + j, v);
    load(weight + j, w);
#pragma unroll
    for (int i = 0; i < N; ++i) dot += g[i] * w[i] * v[i];
  }
  const float r = rstd[row];
  const float c = block_sum<kThreads>(dot) * r * r / static_cast<float>(n);
  for (int64_t j = int64_t{threadIdx.x} * N; j < n; j += kThreads * N) {
    float g[N], v[N], w[N], d[N];
    load(dy + j, g);
    load(x + j, v);
    load(weight + j, w);
    load(dx + j, d);
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] += r * (g[i] * w[i] - c * v[i]);
    store(d, dx + j);
  }
}

constexpr int kHeadWarps = 4;

struct Rotation {
  const float* cos;
  const float* sin;
  const bf16* weight;  // nullptr: no norm
  float eps;
  int64_t heads, head_dim, items;  // items: rows · heads
};

// A lane owns the pairs (j, j + half) for j = lane, lane + 32, …, so that a head may be written over itself.
__global__ void __launch_bounds__(kHeadWarps* kWarp)
    norm_rope_kernel(Rotation r, const bf16* in, int64_t in_stride, bf16* out, int64_t out_stride, float* rstd) {
  const int64_t item = int64_t{blockIdx.x} * kHeadWarps + threadIdx.x / kWarp;
  if (item >= r.items) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = item / r.heads, head = item % r.heads, half = r.head_dim / 2;
  const bf16* x = in + row * in_stride + head * r.head_dim;
  bf16* y = out + row * out_stride + head * r.head_dim;
  float scale = 1.0f;
  if (r.weight != nullptr) {
    float sum = 0.0f;
    for (int64_t j = lane; j < r.head_dim; j += kWarp) {
      const float v = __bfloat162float(x[j]);
      sum += v * v;
    }
    scale = rsqrtf(warp_sum(sum) / static_cast<float>(r.head_dim) + r.eps);
    if (lane == 0) rstd[item] = scale;
  }
  for (int64_t j = lane; j < half; j += kWarp) {
    float a = __bfloat162float(x[j]), b = __bfloat162float(x[j + half]);
    if (r.weight != nullptr) {
      a = __bfloat162float(r.weight[j]) * (a * scale);
      b = __bfloat162float(r.weight[j + half]) * (b * scale);
    }
    const float c = r.cos[row * half + j], s = r.sin[row * half + j];
    y[j] = __float2bfloat16_rn(a * c - b * s);
    y[j + half] = __float2bfloat16_rn(b * c + a * s);
  }
}

__global__ void __launch_bounds__(kHeadWarps* kWarp)
    norm_rope_backward_kernel(Rotation r, bf16* d, int64_t stride, const bf16* in, int64_t in_stride,
                              const float* rstd) {
  const int64_t item = int64_t{blockIdx.x} * kHeadWarps + threadIdx.x / kWarp;
  if (item >= r.items) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = item / r.heads, head = item % r.heads, half = r.head_dim / 2;
  bf16* dx = d + row * stride + head * r.head_dim;
  const bf16* x = in + row * in_stride + head * r.head_dim;
  // The inverse rotation of the pair at j.
  const auto unrotated = [&](int64_t j, float& a, float& b) {
    const float c = r.cos[row * half + j], s = r.sin[row * half + j];
    const float da = __bfloat162float(dx[j]), db = __bfloat162float(dx[j + half]);
    a = da * c + db * s;
    b = db * c - da * s;
  };
  float scale = 1.0f, k = 0.0f;
  if (r.weight != nullptr) {
    float dot = 0.0f;
    for (int64_t j = lane; j < half; j += kWarp) {
      float a, b;
      unrotated(j, a, b);
      dot += a * __bfloat162float(r.weight[j]) * __bfloat162float(x[j]) +
             b * __bfloat162float(r.weight[j + half]) * __bfloat162float(x[j + half]);
    }
    scale = rstd[item];
    k = warp_sum(dot) * scale * scale / static_cast<float>(r.head_dim);
  }
  for (int64_t j = lane; j < half; j += kWarp) {
    float a, b;
    unrotated(j, a, b);
    if (r.weight != nullptr) {
      a = scale * (a * __bfloat162float(r.weight[j]) - k * __bfloat162float(x[j]));
      b = scale * (b * __bfloat162float(r.weight[j + half]) - k * __bfloat162float(x[j + half]));
    }
    dx[j] = __float2bfloat16_rn(a);
    dx[j + half] = __float2bfloat16_rn(b);
  }
}

const bf16* in(const void* p) {
  return static_cast<const bf16*>(p);
}
bf16* out(void* p) {
  return static_cast<bf16*>(p);
}

template <bool Apply>
void launch_rms_norm(HtStream stream, const void* x, const void* weight, void* y, float* rstd, int64_t n, float eps,
                     int64_t row_begin, int64_t row_end) {
  const auto rows = static_cast<unsigned>(row_end - row_begin);
  const bf16* xb = in(x) + row_begin * n;
  bf16* yb = out(y) + row_begin * n;
  const auto s = static_cast<cudaStream_t>(stream);
  if (in_packets(n, xb, weight, yb)) {
    rms_norm_kernel<8, Apply><<<rows, kThreads, 0, s>>>(xb, in(weight), yb, rstd + row_begin, n, eps);
  } else {
    rms_norm_kernel<1, Apply><<<rows, kThreads, 0, s>>>(xb, in(weight), yb, rstd + row_begin, n, eps);
  }
}

Rotation rotation(const HtNormRope& rope, int64_t row_begin, int64_t row_end) {
  const int64_t half = rope.head_dim / 2;
  return {rope.cos + row_begin * half,
          rope.sin + row_begin * half,
          in(rope.weight),
          rope.eps,
          rope.heads,
          rope.head_dim,
          (row_end - row_begin) * rope.heads};
}

unsigned head_blocks(const Rotation& r) {
  return static_cast<unsigned>((r.items + kHeadWarps - 1) / kHeadWarps);
}

}  // namespace

void rms_norm_forward(HtStream stream, const void* x, const void* weight, void* y, float* rstd, int64_t n, float eps,
                      int64_t row_begin, int64_t row_end) {
  launch_rms_norm<false>(stream, x, weight, y, rstd, n, eps, row_begin, row_end);
}

void rms_norm_apply(HtStream stream, const void* x, const void* weight, const float* rstd, void* y, int64_t n,
                    int64_t row_begin, int64_t row_end) {
  launch_rms_norm<true>(stream, x, weight, y, const_cast<float*>(rstd), n, 0.0f, row_begin, row_end);
}

void rms_norm_backward(HtStream stream, const void* dy, const void* x, const void* weight, const float* rstd, void* dx,
                       int64_t n, int64_t row_begin, int64_t row_end) {
  const auto rows = static_cast<unsigned>(row_end - row_begin);
  const int64_t skip = row_begin * n;
  const auto s = static_cast<cudaStream_t>(stream);
  if (in_packets(n, in(dy) + skip, in(x) + skip, out(dx) + skip) && in_packets(n, weight)) {
    rms_norm_backward_kernel<8>
        <<<rows, kThreads, 0, s>>>(in(dy) + skip, in(x) + skip, in(weight), rstd + row_begin, out(dx) + skip, n);
  } else {
    rms_norm_backward_kernel<1>
        <<<rows, kThreads, 0, s>>>(in(dy) + skip, in(x) + skip, in(weight), rstd + row_begin, out(dx) + skip, n);
  }
}

void norm_rope_forward(HtStream stream, const HtNormRope* rope, const void* x, int64_t in_stride, void* y,
                       int64_t out_stride, float* rstd, int64_t row_begin, int64_t row_end) {
  const Rotation r = rotation(*rope, row_begin, row_end);
  norm_rope_kernel<<<head_blocks(r), kHeadWarps * kWarp, 0, static_cast<cudaStream_t>(stream)>>>(
      r, in(x) + row_begin * in_stride, in_stride, out(y) + row_begin * out_stride, out_stride,
      rstd == nullptr ? nullptr : rstd + row_begin * rope->heads);
}

void norm_rope_backward(HtStream stream, const HtNormRope* rope, void* d, int64_t stride, const void* x,
                        int64_t in_stride, const float* rstd, int64_t row_begin, int64_t row_end) {
  const Rotation r = rotation(*rope, row_begin, row_end);
  norm_rope_backward_kernel<<<head_blocks(r), kHeadWarps * kWarp, 0, static_cast<cudaStream_t>(stream)>>>(
      r, out(d) + row_begin * stride, stride, in(x) + row_begin * in_stride, in_stride,
      rstd == nullptr ? nullptr : rstd + row_begin * rope->heads);
}

}  // namespace ht::cuda
