// The head's rows of logits, float32 and as wide as the vocabulary: a block of 1,024 threads a row.

#include <math_constants.h>

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/kernels.h"

namespace ht::cuda {

namespace {

constexpr int kThreads = 1024;

// One pass: each thread keeps the largest logit that it saw and the sum of exp(logit - largest); they are joined in a
// fixed order, in double, so that the rounding error does not grow with the vocabulary.
__global__ void __launch_bounds__(kThreads) logsumexp_kernel(const float* logits, int64_t vocab, float* lse) {
  const float* x = logits + int64_t{blockIdx.x} * vocab;
  float largest = -CUDART_INF_F, sum = 0.0f;
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
    const float value = x[j];
    if (value > largest) {
      sum = sum * expf(largest - value) + 1.0f;
      largest = value;
    } else {
      sum += value == largest ? 1.0f : expf(value - largest);  // NaN stays NaN; -inf after -inf is no NaN
    }
  }
  __shared__ float maxima[kThreads / kWarp];
  float of_block = largest;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    of_block = fmaxf(of_block, __shfl_xor_sync(0xffffffffu, of_block, offset));
  }
  if (threadIdx.x % kWarp == 0) maxima[threadIdx.x / kWarp] = of_block;
  __syncthreads();
  of_block = maxima[0];
  for (int i = 1; i < kThreads / kWarp; ++i) of_block = fmaxf(of_block, maxima[i]);
  // A thread without elements has the sum 0.
  const double part = sum == 0.0f ? 0.0 : static_cast<double>(sum) * expf(largest - of_block);
  const double total = block_sum<kThreads>(part);
  if (threadIdx.x == 0) lse[blockIdx.x] = static_cast<float>(static_cast<double>(of_block) + log(total));
}

__global__ void gather_kernel(const float* logits, int64_t vocab, const float* lse, HtTargets t, float* logprobs,
                              int64_t row_begin, int64_t row_end) {
  const int64_t row = row_begin + int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= row_end) return;
  for (int64_t k = t.offsets[row]; k < t.offsets[row + 1]; ++k) {
    logprobs[k] = logits[row * vocab + t.targets[k]] - lse[row];
  }
}

__global__ void __launch_bounds__(kThreads)
    dlogits_kernel(const float* logits, bf16* dlogits, int64_t vocab, const float* lse, HtTargets t,
                   const float* dlogprobs, int64_t row_begin) {
  const int64_t row = row_begin + blockIdx.x;
  const float* x = logits + row * vocab;
  bf16* out = dlogits + row * vocab;
  const int64_t first = t.offsets[row], last = t.offsets[row + 1];
  float total = 0.0f;
  bool any = false;
  for (int64_t k = first; k < last; ++k) {
    total += dlogprobs[k];
    any = any || dlogprobs[k] != 0.0f;
  }
  const float shift = lse[row];
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
    out[j] = __float2bfloat16_rn(any ? -total * expf(x[j] - shift) : 0.0f);
  }
  if (!any) return;
  __syncthreads();
  // The targets' elements again, with their one-hot part before the rounding; of equal targets the first adds up all.
  for (int64_t k = first + threadIdx.x; k < last; k += kThreads) {
    const int32_t target = t.targets[k];
    float value = -total * expf(x[target] - shift);
    bool is_first = true;
    for (int64_t i = first; i < last; ++i) {
      if (t.targets[i] != target) continue;
      is_first = is_first && i >= k;
      value += dlogprobs[i];
    }
    if (is_first) out[target] = __float2bfloat16_rn(value);
  }
}

}  // namespace

void logsumexp(HtStream stream, const float* logits, int64_t vocab, float* lse, int64_t row_begin, int64_t row_end) {
  logsumexp_kernel<<<static_cast<unsigned>(row_end - row_begin), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      logits + row_begin * vocab, vocab, lse + row_begin);
}

void gather_logprobs(HtStream stream, const float* logits, int64_t vocab, const float* lse, const HtTargets* targets,
                     float* logprobs, int64_t row_begin, int64_t row_end) {
  constexpr int kRowThreads = 128;
  const auto blocks = static_cast<unsigned>((row_end - row_begin + kRowThreads - 1) / kRowThreads);
  gather_kernel<<<blocks, kRowThreads, 0, static_cast<cudaStream_t>(stream)>>>(logits, vocab, lse, *targets, logprobs,
                                                                               row_begin, row_end);
}

void dlogits(HtStream stream, const float* logits, void* dlogits, int64_t vocab, const float* lse,
             const HtTargets* targets, const float* dlogprobs, int64_t row_begin, int64_t row_end) {
  dlogits_kernel<<<static_cast<unsigned>(row_end - row_begin), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      logits, static_cast<bf16*>(dlogits), vocab, lse, *targets, dlogprobs, row_begin);
}

}  // namespace ht::cuda
