// SwiGLU and the optimizer: a thread an element or a packet of eight. The norm of a flat buffer: a block of threads
// sums a block of elements.

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/kernels.h"

namespace ht::cuda {

namespace {

constexpr int kThreads = 256;

unsigned blocks_of(int64_t items) {
  return static_cast<unsigned>((items + kThreads - 1) / kThreads);
}

__device__ inline float sigmoid(float x) {
  return 1.0f / (1.0f + __expf(-x));
}

// `items` packets of N elements, n / N of them in a row.
template <int N>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const bf16* gate_up, bf16* act, int64_t n, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= items) return;
  const int64_t row = item * N / n, j = item * N % n;
  float g[N], u[N];
  load(gate_up + row * 2 * n + j, g);
  load(gate_up + row * 2 * n + n + j, u);
#pragma unroll
  for (int i = 0; i < N; ++i) u[i] *= g[i] * sigmoid(g[i]);
  store(u, act + row * n + j);
}

template <int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const bf16* dact, bf16* gate_up, int64_t n, int64_t items) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= items) return;
  const int64_t row = item * N / n, j = item * N % n;
  bf16* gate = gate_up + row * 2 * n + j;
  bf16* up = gate + n;
  float dy[N], g[N], u[N];
  load(dact + row * n + j, dy);
  load(gate, g);
  load(up, u);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s = sigmoid(g[i]), silu = g[i] * s;
    g[i] = dy[i] * u[i] * (s + silu * (1.0f - s));
    u[i] = dy[i] * silu;
  }
  store(g, gate);
  store(u, up);
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(float* p, const float* grad, float* m, float* v, HtAdamW c, int64_t begin, int64_t end) {
  const int64_t i = begin + int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= end) return;
  const float g = grad[i] * c.grad_scale;
  const float mi = m[i] + c.one_minus_beta1 * (g - m[i]);
  const float vi = v[i] * c.beta2 + c.one_minus_beta2 * g * g;
  const float update = mi == 0.0f ? 0.0f : mi / (sqrtf(vi) / c.bias2 + c.eps);
  m[i] = mi;
  v[i] = vi;
  p[i] = p[i] * c.decay - c.step_size * update;
}

__global__ void __launch_bounds__(kThreads)
    sum_of_squares_kernel(const float* x, int64_t n, int64_t block_size, double* sums, int64_t block_begin) {
  const int64_t block = block_begin + blockIdx.x, begin = block * block_size;
  const int64_t end = begin + block_size < n ? begin + block_size : n;
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum += static_cast<double>(x[i]) * x[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) sums[block] = sum;
}

}  // namespace

void swiglu_forward(HtStream stream, const void* gate_up, void* act, int64_t n, int64_t row_begin, int64_t row_end) {
  const bf16* in = static_cast<const bf16*>(gate_up) + row_begin * 2 * n;
  bf16* out = static_cast<bf16*>(act) + row_begin * n;
  const int64_t elements = (row_end - row_begin) * n;
  const auto s = static_cast<cudaStream_t>(stream);
  if (in_packets(n, in, out)) {
    swiglu_kernel<8><<<blocks_of(elements / 8), kThreads, 0, s>>>(in, out, n, elements / 8);
  } else {
    swiglu_kernel<1><<<blocks_of(elements), kThreads, 0, s>>>(in, out, n, elements);
  }
}

void swiglu_backward(HtStream stream, const void* dact, void* gate_up, int64_t n, int64_t row_begin, int64_t row_end) {
  const bf16* dy = static_cast<const bf16*>(dact) + row_begin * n;
  bf16* in = static_cast<bf16*>(gate_up) + row_begin * 2 * n;
  const int64_t elements = (row_end - row_begin) * n;
  const auto s = static_cast<cudaStream_t>(stream);
  if (in_packets(n, dy, in)) {
    swiglu_backward_kernel<8><<<blocks_of(elements / 8), kThreads, 0, s>>>(dy, in, n, elements / 8);
  } else {
    swiglu_backward_kernel<1><<<blocks_of(elements), kThreads, 0, s>>>(dy, in, n, elements);
  }
}

void adamw(HtStream stream, float* p, const float* grad, float* m, float* v, const HtAdamW* a, int64_t begin,
           int64_t end) {
  adamw_kernel<<<blocks_of(end - begin), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, grad, m, v, *a, begin,
                                                                                           end);
}

void sum_of_squares(HtStream stream, const float* x, int64_t n, int64_t block_size, double* sums, int64_t block_begin,
                    int64_t block_end) {
  sum_of_squares_kernel<<<static_cast<unsigned>(block_end - block_begin), kThreads, 0,
                          static_cast<cudaStream_t>(stream)>>>(x, n, block_size, sums, block_begin);
}

}  // namespace ht::cuda
