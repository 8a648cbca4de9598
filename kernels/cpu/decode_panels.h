#pragma once

// GEMM of few rows with a weight in panels: a vector's lanes are neighbouring columns of y, so that no sum runs across
// lanes and the weight streams from memory in order. Each element of y is one chain of fmas over k, whatever the rows
// beside it.

#include <algorithm>

#include "kernels/cpu/decode_kernels.h"

namespace ht::kernels {

// Two vectors of weights at one k (16-bit types: at k and k + 1), `offset` columns into a panel.
template <class V, HtWeightType kType>
struct PanelLoad;

template <class V>
struct PanelLoad<V, HT_WEIGHT_F32> {
  static constexpr int kDepth = 1;
  static void load(const void* panel, int64_t k, int64_t offset, typename V::Vec (*w)[2]) {
    const float* p = static_cast<const float*>(panel) + k * HT_PANEL_COLUMNS + offset;
    w[0][0] = V::load(p);
    w[0][1] = V::load(p + V::kWidth);
  }
};

template <class V>
struct PanelLoad<V, HT_WEIGHT_BF16> {
  static constexpr int kDepth = 2;
  static void load(const void* panel, int64_t k, int64_t offset, typename V::Vec (*w)[2]) {
    const uint16_t* p = static_cast<const uint16_t*>(panel) + k * HT_PANEL_COLUMNS + 2 * offset;
    V::load_bf16_pairs(p, w[0][0], w[1][0]);
    V::load_bf16_pairs(p + 2 * V::kWidth, w[0][1], w[1][1]);
  }
};

template <class V>
struct PanelLoad<V, HT_WEIGHT_F16> {
  static constexpr int kDepth = 2;
  static void load(const void* panel, int64_t k, int64_t offset, typename V::Vec (*w)[2]) {
    const uint16_t* p = static_cast<const uint16_t*>(panel) + k * HT_PANEL_COLUMNS + offset;
    for (int d = 0; d < 2; ++d) {
      w[d][0] = V::load_f16(p + d * HT_PANEL_COLUMNS);
      w[d][1] = V::load_f16(p + d * HT_PANEL_COLUMNS + V::kWidth);
    }
  }
};

template <class V, HtWeightType kType, int kM>
void panel_tile(const HtPanelGemm& g, const void* panel, int64_t m_begin, int64_t n_begin, int64_t offset) {
  using Load = PanelLoad<V, kType>;
  constexpr int64_t kAhead = 16;  // in k: 1 to 2 KiB
  constexpr int64_t kBytes = kType == HT_WEIGHT_F32 ? 4 : 2;
  const float* x = g.x + m_begin * g.ldx;
  typename V::Vec sums[kM][2];
  for (int i = 0; i < kM; ++i) sums[i][0] = sums[i][1] = V::zero();
  typename V::Vec w[Load::kDepth][2];
  int64_t k = 0;
  for (; k + Load::kDepth <= g.k; k += Load::kDepth) {
    const char* ahead = static_cast<const char*>(panel) + (k + kAhead) * HT_PANEL_COLUMNS * kBytes;
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + 64);
    Load::load(panel, k, offset, w);
    for (int d = 0; d < Load::kDepth; ++d) {
      for (int i = 0; i < kM; ++i) {
        const typename V::Vec xs = V::set1(x[i * g.ldx + k + d]);
        sums[i][0] = V::fma(xs, w[d][0], sums[i][0]);
        sums[i][1] = V::fma(xs, w[d][1], sums[i][1]);
      }
    }
  }
  if (k < g.k) {
    Load::load(panel, k, offset, w);
    for (int i = 0; i < kM; ++i) {
      const typename V::Vec xs = V::set1(x[i * g.ldx + k]);
      sums[i][0] = V::fma(xs, w[0][0], sums[i][0]);
      sums[i][1] = V::fma(xs, w[0][1], sums[i][1]);
    }
  }
  const typename V::Vec alpha = V::set1(g.alpha);
  for (int j = 0; j < 2; ++j) {
    const int64_t n = n_begin + offset + j * V::kWidth;
    const int count = static_cast<int>(std::min<int64_t>(V::kWidth, g.n - n));
    if (count <= 0) break;
    const bool whole = count == V::kWidth;
    const auto load = [whole, count](const float* p) { return whole ? V::load(p) : V::load(p, count); };
    typename V::Vec bias = V::zero();
    if (g.bias != nullptr) bias = load(g.bias + n);
    for (int i = 0; i < kM; ++i) {
      typename V::Vec y = V::fma(alpha, sums[i][j], bias);
      if (g.residual != nullptr) y = V::fma(V::set1(1.0f), load(g.residual + (m_begin + i) * g.ld_residual + n), y);
      float* to = g.y + (m_begin + i) * g.ldy + n;
      if (whole) {
        V::store(to, y);
      } else {
        V::store(to, count, y);
      }
    }
  }
}

template <class V, HtWeightType kType, int kM>
void panel_rows(const HtPanelGemm& g, const void* panel, int64_t rows, int64_t m_begin, int64_t n_begin,
                int64_t offset) {
  if constexpr (kM > 1) {
    if (rows < kM) return panel_rows<V, kType, kM - 1>(g, panel, rows, m_begin, n_begin, offset);
  }
  panel_tile<V, kType, kM>(g, panel, m_begin, n_begin, offset);
}

template <class V, HtWeightType kType>
void panel_gemm_of(const HtPanelGemm& g, int64_t panel_begin, int64_t panel_end) {
  constexpr int64_t kBytes = kType == HT_WEIGHT_F32 ? 4 : 2;
  const int64_t panel_bytes = (g.k + g.k % 2) * HT_PANEL_COLUMNS * kBytes;
  const int64_t tiles = (g.m + V::kPanelRows - 1) / V::kPanelRows;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const void* panel = static_cast<const char*>(g.w) + p * panel_bytes;
    for (int64_t offset = 0; offset < HT_PANEL_COLUMNS; offset += 2 * V::kWidth) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t m_begin = tile * g.m / tiles;
        panel_rows<V, kType, V::kPanelRows>(g, panel, (tile + 1) * g.m / tiles - m_begin, m_begin, p * HT_PANEL_COLUMNS,
                                            offset);
      }
    }
  }
}

template <class V>
void panel_gemm(const HtPanelGemm& g, int64_t panel_begin, int64_t panel_end) {
  switch (g.w_type) {
    case HT_WEIGHT_F32:
      panel_gemm_of<V, HT_WEIGHT_F32>(g, panel_begin, panel_end);
      break;
    case HT_WEIGHT_BF16:
      panel_gemm_of<V, HT_WEIGHT_BF16>(g, panel_begin, panel_end);
      break;
    case HT_WEIGHT_F16:
      panel_gemm_of<V, HT_WEIGHT_F16>(g, panel_begin, panel_end);
      break;
  }
}

}  // namespace ht::kernels
