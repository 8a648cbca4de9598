#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels/cpu/decode_kernels.h"

namespace ht::engine {

// A copy of a weight (N, K) in the panels of kernels/cpu/decode_kernels.h, for products with few rows: their time is
// that of reading the weight.
struct PackedWeight {
  at::Tensor data;  // undefined: there is none
  HtWeightType type = HT_WEIGHT_F32;
  std::int64_t n = 0, k = 0;

  bool defined() const { return data.defined(); }
  std::int64_t panels() const { return (n + HT_PANEL_COLUMNS - 1) / HT_PANEL_COLUMNS; }
};

// weight (N, K) float32, contiguous.
PackedWeight pack_weight(const at::Tensor& weight);
// In bfloat16 or float16, whichever holds every value exactly; undefined where neither does.
PackedWeight pack_weight_16_bits(const at::Tensor& weight);

// The arguments of y = x Wᵀ for the kernel: x (m, K) and y (m, N) with rows ldx and ldy floats apart.
HtPanelGemm panel_gemm(const PackedWeight& weight, const float* x, std::int64_t ldx, std::int64_t m, float* y,
                       std::int64_t ldy);

}  // namespace ht::engine
