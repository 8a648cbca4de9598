#pragma once

// What the kernels share: bfloat16 in packets of 16 bytes, and sums over a block in a fixed order.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace ht::cuda {

using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;

// N neighbouring elements as floats; N = 8 is one access of 16 bytes.
template <int N>
__device__ inline void load(const bf16* from, float (&to)[N]) {
  if constexpr (N == 8) {
    const uint4 packet = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {packet.x, packet.y, packet.z, packet.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
    static_assert(N == 1);
    to[0] = __bfloat162float(from[0]);
  }
}

template <int N>
__device__ inline void store(const float (&from)[N], bf16* to) {
  if constexpr (N == 8) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    to[0] = __float2bfloat16_rn(from[0]);
  }
}

template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sum over the block's Threads threads, in every thread: always the same order, so always the same bits.
template <int Threads, typename T>
__device__ inline T block_sum(T value) {
  __shared__ T sums[Threads / kWarp];
  value = warp_sum(value);
  __syncthreads();  // a former call's sums are read
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = sums[0];
#pragma unroll
  for (int i = 1; i < Threads / kWarp; ++i) total += sums[i];
  return total;
}

// True when rows of n elements that start at these addresses can be read in packets of 8.
inline bool in_packets(int64_t n, const void* a, const void* b = nullptr, const void* c = nullptr) {
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c);
  return n % 8 == 0 && bits % 16 == 0;
}

}  // namespace ht::cuda
