#pragma once

// The skinny GEMM: dot products of rows of x with rows of W. A tile of W stays in the first-level cache while all rows
// of x pass over it; at one row the time is that of reading W. Each element of y is one chain of vector fmas over k, in
// the same order whatever tile it lies in.

#include <algorithm>

#include "kernels/cpu/decode_kernels.h"

namespace ht::kernels {

template <class V, int kM, int kN>
void skinny_tile(const HtSkinnyGemm& g, int64_t m_begin, int64_t n_begin) {
  const float* x = g.x + m_begin * g.ldx;
  const float* w = g.w + n_begin * g.k;
  typename V::Vec sums[kM][kN];
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) sums[i][j] = V::zero();
  }
  int64_t k = 0;
  for (; k + V::kWidth <= g.k; k += V::kWidth) {
    typename V::Vec xs[kM];
    for (int i = 0; i < kM; ++i) xs[i] = V::load(x + i * g.ldx + k);
    for (int j = 0; j < kN; ++j) {
      const typename V::Vec ws = V::load(w + j * g.k + k);
      for (int i = 0; i < kM; ++i) sums[i][j] = V::fma(xs[i], ws, sums[i][j]);
    }
  }
  if (k < g.k) {
    const int rest = static_cast<int>(g.k - k);
    typename V::Vec xs[kM];
    for (int i = 0; i < kM; ++i) xs[i] = V::load(x + i * g.ldx + k, rest);
    for (int j = 0; j < kN; ++j) {
      const typename V::Vec ws = V::load(w + j * g.k + k, rest);
      for (int i = 0; i < kM; ++i) sums[i][j] = V::fma(xs[i], ws, sums[i][j]);
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      const int64_t n = n_begin + j;
      float y = g.alpha * V::sum(sums[i][j]);
      if (g.bias != nullptr) y += g.bias[n];
      if (g.residual != nullptr) y += g.residual[(m_begin + i) * g.ld_residual + n];
      g.y[(m_begin + i) * g.ldy + n] = y;
    }
  }
}

template <class V, int kN>
void skinny_columns(const HtSkinnyGemm& g, int64_t n_begin) {
  const int64_t tiles = (g.m + V::kTileRows - 1) / V::kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m_begin = tile * g.m / tiles;
    switch ((tile + 1) * g.m / tiles - m_begin) {
      case 1:
        skinny_tile<V, 1, kN>(g, m_begin, n_begin);
        break;
      case 2:
        skinny_tile<V, 2, kN>(g, m_begin, n_begin);
        break;
      case 3:
        skinny_tile<V, 3, kN>(g, m_begin, n_begin);
        break;
      case 4:
        skinny_tile<V, 4, kN>(g, m_begin, n_begin);
        break;
      case 5:
        if constexpr (V::kTileRows >= 5) skinny_tile<V, 5, kN>(g, m_begin, n_begin);
        break;
      default:
        if constexpr (V::kTileRows >= 6) skinny_tile<V, 6, kN>(g, m_begin, n_begin);
    }
  }
}

template <class V>
void skinny_gemm(const HtSkinnyGemm& g, int64_t n_begin, int64_t n_end) {
  int64_t n = n_begin;
  if (g.m == 1) {
    // One row of x: eight independent chains hide the latency of the fma.
    for (; n + 8 <= n_end; n += 8) skinny_tile<V, 1, 8>(g, 0, n);
  }
  for (; n + V::kTileVectors <= n_end; n += V::kTileVectors) skinny_columns<V, V::kTileVectors>(g, n);
  for (; n < n_end; ++n) skinny_columns<V, 1>(g, n);
}

}  // namespace ht::kernels
