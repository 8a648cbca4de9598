#pragma once

#include <stdint.h>

#include <bit>

namespace ht::kernels {

// bfloat16 in memory: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

inline float to_float(Bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Rounds to the nearest, ties to even; NaN stays NaN.
inline Bf16 to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace ht::kernels
