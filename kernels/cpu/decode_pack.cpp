#include <immintrin.h>
#include <string.h>

#include <algorithm>
#include <bit>

#include "kernels/cpu/decode_kernels.h"

namespace {

constexpr int64_t kColumns = HT_PANEL_COLUMNS;

// Writes x as `type` at element `at` of `out`; false if it changes.
template <HtWeightType kType>
bool put(void* out, int64_t at, float x) {
  if constexpr (kType == HT_WEIGHT_F32) {
    static_cast<float*>(out)[at] = x;
    return true;
  } else if constexpr (kType == HT_WEIGHT_BF16) {
    const auto bits = std::bit_cast<uint32_t>(x);
    static_cast<uint16_t*>(out)[at] = static_cast<uint16_t>(bits >> 16);
    return (bits & 0xffffu) == 0;
  } else {
    const unsigned short half = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
    static_cast<uint16_t*>(out)[at] = half;
    return _cvtsh_ss(half) == x;
  }
}

template <HtWeightType kType>
bool pack(const float* w, int64_t n, int64_t k, void* out, int64_t panel) {
  constexpr int64_t kBytes = kType == HT_WEIGHT_F32 ? 4 : 2;
  const int64_t depth = k + k % 2, base = panel * depth * kColumns;
  const int64_t columns = std::min(kColumns, n - panel * kColumns);
  if (columns < kColumns || depth > k) {
    memset(static_cast<char*>(out) + base * kBytes, 0, static_cast<size_t>(depth * kColumns * kBytes));
  }
  bool exact = true;
  for (int64_t c = 0; c < columns; ++c) {
    const float* row = w + (panel * kColumns + c) * k;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t at = kType == HT_WEIGHT_BF16 ? (i - i % 2) * kColumns + 2 * c + i % 2 : i * kColumns + c;
      exact &= put<kType>(out, base + at, row[i]);
    }
  }
  return exact;
}

}  // namespace

int64_t ht_panel_elements(int64_t n, int64_t k) {
  return (n + kColumns - 1) / kColumns * kColumns * (k + k % 2);
}

int ht_pack_panels(const float* w, int64_t n, int64_t k, HtWeightType type, void* out, int64_t panel_begin,
                   int64_t panel_end) {
  const auto pack_one = type == HT_WEIGHT_F32    ? pack<HT_WEIGHT_F32>
                        : type == HT_WEIGHT_BF16 ? pack<HT_WEIGHT_BF16>
                                                 : pack<HT_WEIGHT_F16>;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    if (!pack_one(w, n, k, out, panel)) return 0;
  }
  return 1;
}
