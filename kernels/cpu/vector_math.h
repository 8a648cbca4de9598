#pragma once

// Branch-free exp that compilers vectorise. Relative error of a few ulp (Cephes expf's polynomial); NaN stays NaN.

#include <stdint.h>

#include <bit>

namespace ht::kernels {

// Saturates outside [-87.33, 88]: the result is always a normal float.
inline float fast_exp(float x) {
  const float clamped = x < -87.33f ? -87.33f : (x > 88.0f ? 88.0f : x);
  // Adding 1.5·2^23 rounds to the nearest integer and leaves it in the low bits.
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const int32_t n = std::bit_cast<int32_t>(shifted) - 0x4B400000;
  const float fn = static_cast<float>(n);
  // ln 2 in two parts; explicit fma, as these kernels allow the compiler to reassociate sums.
  const float r = __builtin_fmaf(fn, 2.12194440e-4f, __builtin_fmaf(fn, -0.693359375f, clamped));
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  return p * std::bit_cast<float>((n + 127) << 23);
}

}  // namespace ht::kernels
