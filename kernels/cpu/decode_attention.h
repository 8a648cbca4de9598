#pragma once

// Attention of a few query rows over the blocks of a sequence. Decoding and prefill run the same code, a row of a tile
// goes through the same operations whatever rows lie beside it.

#include <math.h>

#include <algorithm>

#include "kernels/cpu/decode_kernels.h"
#include "kernels/cpu/vector_math.h"

namespace ht::kernels {

// c [kM][ldc] (+)= a [kM][lda] · b [depth][ldb] on kN vectors of columns; the last vector has `count` columns.
template <class V, int kM, int kN>
void multiply_tile(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                   int count, bool accumulate) {
  constexpr int kWidth = V::kWidth;
  const bool whole = count == kWidth;
  typename V::Vec sums[kM][kN];
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      const float* p = c + i * ldc + j * kWidth;
      sums[i][j] = !accumulate ? V::zero() : whole || j + 1 < kN ? V::load(p) : V::load(p, count);
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    typename V::Vec bs[kN];
    for (int j = 0; j < kN; ++j) {
      const float* p = b + d * ldb + j * kWidth;
      bs[j] = whole || j + 1 < kN ? V::load(p) : V::load(p, count);
    }
    for (int i = 0; i < kM; ++i) {
      const typename V::Vec as = V::set1(a[i * lda + d]);
      for (int j = 0; j < kN; ++j) sums[i][j] = V::fma(as, bs[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      float* p = c + i * ldc + j * kWidth;
      if (whole || j + 1 < kN) {
        V::store(p, sums[i][j]);
      } else {
        V::store(p, count, sums[i][j]);
      }
    }
  }
}

template <class V, int kN>
void multiply_columns(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
                      int64_t depth, int count, bool accumulate) {
  const int64_t tiles = (rows + V::kTileRows - 1) / V::kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i = tile * rows / tiles;
    float* ci = c + i * ldc;
    const float* ai = a + i * lda;
    switch ((tile + 1) * rows / tiles - i) {
      case 1:
        multiply_tile<V, 1, kN>(ci, ldc, ai, lda, b, ldb, depth, count, accumulate);
        break;
      case 2:
        multiply_tile<V, 2, kN>(ci, ldc, ai, lda, b, ldb, depth, count, accumulate);
        break;
      case 3:
        multiply_tile<V, 3, kN>(ci, ldc, ai, lda, b, ldb, depth, count, accumulate);
        break;
      case 4:
        multiply_tile<V, 4, kN>(ci, ldc, ai, lda, b, ldb, depth, count, accumulate);
        break;
      case 5:
        if constexpr (V::kTileRows >= 5) multiply_tile<V, 5, kN>(ci, ldc, ai, lda, b, ldb, depth, count, accumulate);
        break;
      default:
        if constexpr (V::kTileRows >= 6) multiply_tile<V, 6, kN>(ci, ldc, ai, lda, b, ldb, depth, count, accumulate);
    }
  }
}

// c [rows][ldc] (+)= a [rows][lda] · b [depth][ldb] on `columns` columns.
template <class V>
void multiply(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
              int64_t depth, int64_t columns, bool accumulate) {
  constexpr int64_t kStep = V::kTileVectors * V::kWidth;
  int64_t n = 0;
  for (; n + kStep <= columns; n += kStep) {
    multiply_columns<V, V::kTileVectors>(c + n, ldc, a, lda, b + n, ldb, rows, depth, V::kWidth, accumulate);
  }
  for (; n < columns; n += V::kWidth) {
    const int count = static_cast<int>(std::min<int64_t>(V::kWidth, columns - n));
    multiply_columns<V, 1>(c + n, ldc, a, lda, b + n, ldb, rows, depth, count, accumulate);
  }
}

// scratch: num_rows · num_heads · (2 head_dim + block_size) floats.
template <class V>
void attend_tile(const HtPagedAttention& a, const HtQueryTile& tile, float* scratch) {
  const int64_t dim = a.cache.head_dim;
  const int64_t block_size = a.cache.block_size;
  const int64_t rows = tile.num_rows * tile.num_heads;  // (query row, head), heads fastest
  const int64_t kv_head = tile.head_begin / (a.heads / a.cache.kv_heads);
  float* q = scratch;
  float* o = q + rows * dim;
  float* p = o + rows * dim;
  float max[HT_ATTENTION_MAX_ROWS];
  float sum[HT_ATTENTION_MAX_ROWS];

  for (int64_t i = 0; i < rows; ++i) {
    const float* from =
        a.q + (tile.row_begin + i / tile.num_heads) * a.q_stride + (tile.head_begin + i % tile.num_heads) * dim;
    for (int64_t d = 0; d < dim; ++d) q[i * dim + d] = from[d] * a.scale;
    for (int64_t d = 0; d < dim; ++d) o[i * dim + d] = 0.0f;
    max[i] = -INFINITY;
    sum[i] = 0.0f;
  }

  const int64_t last = tile.position + tile.num_rows - 1;
  const int64_t first = a.window > 0 ? std::max<int64_t>(0, tile.position - a.window + 1) : 0;
  for (int64_t b = first / block_size; b <= last / block_size; ++b) {
    const int64_t begin = b * block_size;
    // Slots after the last position may hold anything: their scores are not read, their values not multiplied.
    const int64_t filled = std::min(block_size, last - begin + 1);
    const int64_t cache_row = tile.block_table[b] * a.cache.kv_heads + kv_head;
    multiply<V>(p, block_size, q, dim, a.cache.k + cache_row * dim * block_size, block_size, rows, dim, filled, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* pi = p + i * block_size;
      const int64_t position = tile.position + i / tile.num_heads;
      const int64_t hi = std::min(filled, position - begin + 1);
      const int64_t lo = a.window > 0 ? std::max<int64_t>(0, position - a.window + 1 - begin) : 0;
      if (hi <= lo) {
        for (int64_t j = 0; j < filled; ++j) pi[j] = 0.0f;
        continue;
      }
      float top = max[i];
      for (int64_t j = lo; j < hi; ++j) top = pi[j] > top ? pi[j] : top;
      const float shrink = sum[i] == 0.0f ? 0.0f : fast_exp(max[i] - top);
      float total = 0.0f;
      for (int64_t j = 0; j < lo; ++j) pi[j] = 0.0f;
      for (int64_t j = lo; j < hi; ++j) {
        pi[j] = fast_exp(pi[j] - top);
        total += pi[j];
      }
      for (int64_t j = hi; j < filled; ++j) pi[j] = 0.0f;
      max[i] = top;
      sum[i] = sum[i] * shrink + total;
      if (shrink != 1.0f) {
        for (int64_t d = 0; d < dim; ++d) o[i * dim + d] *= shrink;
      }
    }
    multiply<V>(o, dim, p, block_size, a.cache.v + cache_row * block_size * dim, dim, rows, filled, dim, true);
  }

  for (int64_t i = 0; i < rows; ++i) {
    float* to =
        a.out + (tile.row_begin + i / tile.num_heads) * a.out_stride + (tile.head_begin + i % tile.num_heads) * dim;
    const float inverse = 1.0f / sum[i];
    for (int64_t d = 0; d < dim; ++d) to[d] = o[i * dim + d] * inverse;
  }
}

}  // namespace ht::kernels
