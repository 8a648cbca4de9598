#include "kernels/cpu/decode_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/cpu/decode_isa.h"

namespace {

using ht::kernels::attend_tile_avx2;
using ht::kernels::attend_tile_avx512;
using ht::kernels::skinny_gemm_avx2;
using ht::kernels::skinny_gemm_avx512;

std::vector<float> random_values(std::size_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(random);
  return values;
}

struct SkinnyCase {
  int m, n, k;
};

class SkinnyGemm : public testing::TestWithParam<std::tuple<bool, SkinnyCase>> {};

TEST_P(SkinnyGemm, EqualsTheSumInDouble) {
  const auto [avx512, shape] = GetParam();
  if (avx512 && !ht::kernels::has_avx512()) GTEST_SKIP() << "no AVX-512";
  const auto [m, n, k] = shape;
  const std::size_t ldx = k + 3, ldy = n + 5;
  const std::vector<float> x = random_values(m * ldx, 1), w = random_values(n * k, 2), bias = random_values(n, 3);
  const std::vector<float> residual = random_values(m * ldy, 4);
  std::vector<float> y = residual;
  HtSkinnyGemm gemm{};
  gemm.x = x.data();
  gemm.ldx = static_cast<std::int64_t>(ldx);
  gemm.w = w.data();
  gemm.bias = bias.data();
  gemm.residual = y.data();
  gemm.ld_residual = gemm.ldy = static_cast<std::int64_t>(ldy);
  gemm.y = y.data();
  gemm.m = m;
  gemm.n = n;
  gemm.k = k;
  gemm.alpha = 0.5f;
  const auto run = avx512 ? skinny_gemm_avx512 : skinny_gemm_avx2;
  run(gemm, 0, n / 3);
  run(gemm, n / 3, n);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int l = 0; l < k; ++l) {
        const double term = 0.5 * double{x[i * ldx + l]} * double{w[static_cast<std::size_t>(j) * k + l]};
        sum += term;
        size += std::abs(term);
      }
      const double expected = sum + bias[j] + residual[i * ldy + j];
      ASSERT_NEAR(y[i * ldy + j], expected, 1e-6 * size + 1e-6) << "at " << i << ", " << j;
    }
    for (std::size_t j = n; j < ldy; ++j) ASSERT_EQ(y[i * ldy + j], residual[i * ldy + j]) << "beyond a row's end";
  }
}

TEST_P(SkinnyGemm, ARowsBitsDoNotDependOnTheOtherRows) {
  const auto [avx512, shape] = GetParam();
  if (avx512 && !ht::kernels::has_avx512()) GTEST_SKIP() << "no AVX-512";
  const auto [m, n, k] = shape;
  const std::vector<float> x = random_values(m * k, 1), w = random_values(n * k, 2);
  const auto run = [&](int first, int rows) {
    std::vector<float> y(static_cast<std::size_t>(rows) * n);
    HtSkinnyGemm gemm{};
    gemm.x = x.data() + static_cast<std::size_t>(first) * k;
    gemm.ldx = k;
    gemm.w = w.data();
    gemm.y = y.data();
    gemm.ldy = n;
    gemm.m = rows;
    gemm.n = n;
    gemm.k = k;
    gemm.alpha = 1.0f;
    (avx512 ? skinny_gemm_avx512 : skinny_gemm_avx2)(gemm, 0, n);
    return y;
  };
  const std::vector<float> all = run(0, m);
  for (int i = 0; i < m; ++i) {
    const std::vector<float> alone = run(i, 1);
    ASSERT_TRUE(std::equal(alone.begin(), alone.end(), all.begin() + static_cast<std::ptrdiff_t>(i) * n))
        << "row " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, SkinnyGemm,
                         testing::Combine(testing::Bool(),
                                          testing::Values(SkinnyCase{1, 1, 1}, SkinnyCase{1, 37, 64},
                                                          SkinnyCase{2, 24, 19}, SkinnyCase{3, 33, 96},
                                                          SkinnyCase{5, 16, 7}, SkinnyCase{7, 20, 576},
                                                          SkinnyCase{16, 29, 48}, SkinnyCase{32, 11, 130})));

class PanelGemm : public testing::TestWithParam<std::tuple<bool, SkinnyCase>> {};

TEST_P(PanelGemm, EqualsTheSumInDoubleAndARowsBitsDoNotDependOnTheOtherRows) {
  const auto [avx512, shape] = GetParam();
  if (avx512 && !ht::kernels::has_avx512()) GTEST_SKIP() << "no AVX-512";
  const auto [m, n, k] = shape;
  const std::int64_t ldx = k + 3, ldy = n + 5;
  const std::vector<float> x = random_values(m * ldx, 1), bias = random_values(n, 3);
  const std::vector<float> residual = random_values(m * ldy, 4);
  for (const HtWeightType type : {HT_WEIGHT_F32, HT_WEIGHT_BF16, HT_WEIGHT_F16}) {
    std::vector<float> w = random_values(n * k, 2);
    std::vector<char> packed(static_cast<std::size_t>(ht_panel_elements(n, k)) * 4, 1);
    const std::int64_t panels = (n + HT_PANEL_COLUMNS - 1) / HT_PANEL_COLUMNS;
    if (type != HT_WEIGHT_F32) {
      EXPECT_EQ(ht_pack_panels(w.data(), n, k, type, packed.data(), 0, panels), 0) << "rounded in silence";
    }
    for (float& value : w) {
      if (type == HT_WEIGHT_BF16) value = std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & 0xffff0000u);
      if (type == HT_WEIGHT_F16) value = static_cast<float>(static_cast<_Float16>(value));
    }
    ASSERT_EQ(ht_pack_panels(w.data(), n, k, type, packed.data(), 0, panels), 1);
    std::vector<float> y = residual;
    HtPanelGemm gemm{};
    gemm.x = x.data();
    gemm.ldx = ldx;
    gemm.w = packed.data();
    gemm.w_type = type;
    gemm.bias = bias.data();
    gemm.residual = gemm.y = y.data();
    gemm.ld_residual = gemm.ldy = ldy;
    gemm.m = m;
    gemm.n = n;
    gemm.k = k;
    gemm.alpha = 0.5f;
    const auto run = avx512 ? ht::kernels::panel_gemm_avx512 : ht::kernels::panel_gemm_avx2;
    run(gemm, 0, panels / 2);
    run(gemm, panels / 2, panels);
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        double sum = 0, size = 0;
        for (int l = 0; l < k; ++l) {
          const double term = 0.5 * double{x[i * ldx + l]} * double{w[static_cast<std::size_t>(j) * k + l]};
          sum += term;
          size += std::abs(term);
        }
        const double expected = sum + bias[j] + residual[i * ldy + j];
        ASSERT_NEAR(y[i * ldy + j], expected, 1e-6 * size + 1e-6) << "type " << type << " at " << i << ", " << j;
      }
      for (std::int64_t j = n; j < ldy; ++j) ASSERT_EQ(y[i * ldy + j], residual[i * ldy + j]) << "beyond a row's end";

      std::vector<float> alone(residual.begin() + i * ldy, residual.begin() + (i + 1) * ldy);
      HtPanelGemm one = gemm;
      one.x = x.data() + i * ldx;
      one.residual = one.y = alone.data();
      one.m = 1;
      run(one, 0, panels);
      ASSERT_TRUE(std::equal(alone.begin(), alone.end(), y.begin() + i * ldy)) << "row " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, PanelGemm,
                         testing::Combine(testing::Bool(),
                                          testing::Values(SkinnyCase{1, 1, 1}, SkinnyCase{1, 37, 64},
                                                          SkinnyCase{2, 24, 19}, SkinnyCase{3, 97, 96},
                                                          SkinnyCase{12, 64, 7}, SkinnyCase{13, 40, 576},
                                                          SkinnyCase{16, 29, 48}, SkinnyCase{32, 65, 131})));

struct AttentionCase {
  int heads, kv_heads, dim, block_size, window, position, rows;
};

class PagedAttentionKernel : public testing::TestWithParam<std::tuple<bool, AttentionCase>> {};

TEST_P(PagedAttentionKernel, EqualsSoftmaxInDouble) {
  const auto [avx512, c] = GetParam();
  if (avx512 && !ht::kernels::has_avx512()) GTEST_SKIP() << "no AVX-512";
  const int length = c.position + c.rows, blocks = (length + c.block_size - 1) / c.block_size;
  const std::size_t kv = static_cast<std::size_t>(c.kv_heads) * c.dim,
                    q_width = static_cast<std::size_t>(c.heads) * c.dim;
  const std::vector<float> k = random_values(length * kv, 1), v = random_values(length * kv, 2);
  const std::vector<float> q = random_values(c.rows * q_width, 3);
  // Blocks in shuffled places of a larger cache that is full of NaN: what was not stored must not be read into a
  // result.
  std::vector<std::int32_t> table(2 * blocks);
  for (int i = 0; i < 2 * blocks; ++i) table[i] = i;
  std::shuffle(table.begin(), table.end(), std::mt19937(4));
  std::vector<float> k_cache(2 * blocks * c.block_size * kv, NAN), v_cache = k_cache;
  HtPagedAttention attention{};
  attention.cache = {k_cache.data(), v_cache.data(), c.kv_heads, c.dim, c.block_size};
  std::vector<std::int64_t> slots;
  for (int i = 0; i < length; ++i) slots.push_back(table[i / c.block_size] * c.block_size + i % c.block_size);
  const auto stride = static_cast<std::int64_t>(kv);
  ht_store_kv(&attention.cache, k.data(), stride, v.data(), stride, slots.data(), 0, length);

  std::vector<float> out(c.rows * q_width);
  attention.q = q.data();
  attention.out = out.data();
  attention.q_stride = attention.out_stride = static_cast<std::int64_t>(q_width);
  attention.heads = c.heads;
  attention.window = c.window;
  attention.scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
  const int group = c.heads / c.kv_heads;
  ASSERT_LE(c.rows * group, static_cast<int>(HT_ATTENTION_MAX_ROWS));
  std::vector<float> scratch(HT_ATTENTION_MAX_ROWS * (2 * c.dim + c.block_size));
  for (int head = 0; head < c.heads; head += group) {
    const HtQueryTile tile{table.data(), 0, c.rows, c.position, head, group};
    (avx512 ? attend_tile_avx512 : attend_tile_avx2)(attention, tile, scratch.data());
  }

  for (int row = 0; row < c.rows; ++row) {
    for (int head = 0; head < c.heads; ++head) {
      const int position = c.position + row, first = c.window > 0 ? std::max(0, position - c.window + 1) : 0;
      const std::size_t kv_head = static_cast<std::size_t>(head / group) * c.dim;
      std::vector<double> weights, expected(c.dim);
      double sum = 0;
      for (int j = first; j <= position; ++j) {
        double score = 0;
        for (int d = 0; d < c.dim; ++d) {
          score +=
              double{q[row * q_width + static_cast<std::size_t>(head) * c.dim + d]} * double{k[j * kv + kv_head + d]};
        }
        weights.push_back(std::exp(score / std::sqrt(static_cast<double>(c.dim))));
        sum += weights.back();
      }
      for (int d = 0; d < c.dim; ++d) {
        double expected = 0;
        for (int j = first; j <= position; ++j) expected += weights[j - first] / sum * double{v[j * kv + kv_head + d]};
        ASSERT_NEAR(out[row * q_width + static_cast<std::size_t>(head) * c.dim + d], expected, 2e-6)
            << "row " << row << " head " << head << " dim " << d;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, PagedAttentionKernel,
    testing::Combine(testing::Bool(), testing::Values(AttentionCase{9, 3, 64, 16, 0, 0, 1},    // a first token
                                                      AttentionCase{9, 3, 64, 16, 0, 100, 1},  // decoding
                                                      AttentionCase{9, 3, 64, 16, 0, 37, 10},  // a chunk after a prefix
                                                      AttentionCase{4, 4, 20, 16, 0, 0, 32},   // odd head_dim
                                                      AttentionCase{8, 1, 32, 5, 0, 13, 3},    // odd block size
                                                      AttentionCase{4, 2, 16, 16, 7, 40, 12},  // sliding window
                                                      AttentionCase{4, 2, 16, 32, 40, 20, 16},  // window over the start
                                                      AttentionCase{32, 1, 128, 16, 0, 50, 1})));

TEST(RowSums, EqualTheSumInDouble) {
  const std::vector<float> logits = random_values(1000, 5);
  const float max = ht_row_max(logits.data(), 1000);
  EXPECT_EQ(max, *std::max_element(logits.begin(), logits.end()));
  double sums[4], expected = 0;
  for (const float logit : logits) expected += std::exp(1.5 * (double{logit} - double{max}));
  EXPECT_NEAR(ht_row_exp_sums(logits.data(), 1000, max, 1.5f, sums), expected, 1e-6 * expected);
  EXPECT_NEAR(sums[0] + sums[1] + sums[2] + sums[3], expected, 1e-6 * expected);
}

TEST(RowSums, MaxReportsNaN) {
  std::vector<float> logits = random_values(100, 6);
  logits[57] = NAN;
  EXPECT_TRUE(std::isnan(ht_row_max(logits.data(), 100)));
}

}  // namespace
