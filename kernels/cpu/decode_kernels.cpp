#include "kernels/cpu/decode_kernels.h"

#include <math.h>

#include <algorithm>
#include <vector>

#include "kernels/cpu/decode_isa.h"
#include "kernels/cpu/vector_math.h"

namespace ht::kernels {

bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}

}  // namespace ht::kernels

using namespace ht::kernels;

void ht_skinny_gemm(const HtSkinnyGemm* gemm, int64_t n_begin, int64_t n_end) {
  (has_avx512() ? skinny_gemm_avx512 : skinny_gemm_avx2)(*gemm, n_begin, n_end);
}

void ht_panel_gemm(const HtPanelGemm* gemm, int64_t panel_begin, int64_t panel_end) {
  (has_avx512() ? panel_gemm_avx512 : panel_gemm_avx2)(*gemm, panel_begin, panel_end);
}

void ht_store_kv(const HtKvCache* cache, const float* k, int64_t k_stride, const float* v, int64_t v_stride,
                 const int64_t* slots, int64_t row_begin, int64_t row_end) {
  const int64_t dim = cache->head_dim;
  const int64_t block_size = cache->block_size;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t block = slots[row] / block_size;
    const int64_t offset = slots[row] % block_size;
    for (int64_t head = 0; head < cache->kv_heads; ++head) {
      const int64_t base = (block * cache->kv_heads + head) * dim * block_size;
      const float* from_k = k + row * k_stride + head * dim;
      const float* from_v = v + row * v_stride + head * dim;
      float* to_k = cache->k + base + offset;
      float* to_v = cache->v + base + offset * dim;
      for (int64_t d = 0; d < dim; ++d) to_k[d * block_size] = from_k[d];
      for (int64_t d = 0; d < dim; ++d) to_v[d] = from_v[d];
    }
  }
}

void ht_paged_attention(const HtPagedAttention* attention, const HtQueryTile* tiles, int64_t tile_begin,
                        int64_t tile_end) {
  const auto attend = has_avx512() ? attend_tile_avx512 : attend_tile_avx2;
  thread_local std::vector<float> scratch;
  scratch.resize(
      static_cast<size_t>(HT_ATTENTION_MAX_ROWS * (2 * attention->cache.head_dim + attention->cache.block_size)));
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) attend(*attention, tiles[tile], scratch.data());
}

float ht_row_max(const float* logits, int64_t n) {
  float max = -INFINITY;
  bool unordered = false;
  for (int64_t i = 0; i < n; ++i) {
    max = logits[i] > max ? logits[i] : max;
    unordered |= logits[i] != logits[i];
  }
  return unordered ? NAN : max;
}

double ht_row_exp_sums(const float* logits, int64_t n, float max, float inverse_temperature, double* sums) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += HT_SUM_BLOCK) {
    const int64_t end = std::min<int64_t>(begin + HT_SUM_BLOCK, n);
    float sum = 0.0f;
    for (int64_t i = begin; i < end; ++i) sum += fast_exp((logits[i] - max) * inverse_temperature);
    sums[begin / HT_SUM_BLOCK] = sum;
    total += sum;
  }
  return total;
}

void ht_row_exp(const float* logits, int64_t n, float max, float inverse_temperature, float* weights) {
  for (int64_t i = 0; i < n; ++i) weights[i] = fast_exp((logits[i] - max) * inverse_temperature);
}
