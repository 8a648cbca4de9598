#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "engine/device/cpu.h"
#include "engine/ops/attention.h"
#include "engine/ops/gradient_check.h"
#include "engine/ops/linear.h"
#include "engine/ops/lora.h"
#include "engine/ops/rms_norm.h"
#include "engine/ops/rope.h"
#include "engine/ops/swiglu.h"
#include "engine/ops/token_logprobs.h"

namespace ht::engine {
namespace {

TEST(RmsNorm, MatchesReferenceAndFiniteDifferences) {
  const at::Tensor x = test_tensor({5, 24}, 1), w = test_tensor({24}, 2), dy = test_tensor({5, 24}, 3);
  at::Tensor rstd;
  const at::Tensor y = rms_norm_forward(cpu_device(), x, w, 1e-5, rstd);
  expect_close(y, rms_norm_reference(x.to(at::kDouble), w, 1e-5), "y");
  EXPECT_TRUE(same_bits(y, rms_norm_apply(cpu_device(), x, w, rstd)));
  const at::Tensor residual = test_tensor({5, 24}, 4);
  at::Tensor dx = residual.clone();
  rms_norm_backward(cpu_device(), dy, x, w, rstd, dx);
  const at::Tensor expected = finite_differences(
      [&](const at::Tensor& p) { return (rms_norm_reference(p, w, 1e-5) * dy.to(at::kDouble)).sum(); }, x);
  expect_close(dx, expected + residual.to(at::kDouble), "dx");
}

TEST(SwiGlu, MatchesReferenceAndFiniteDifferences) {
  at::Tensor x = test_tensor({4, 34}, 5, 2.0);
  const at::Tensor dy = test_tensor({4, 17}, 6);
  expect_close(swiglu_forward(cpu_device(), x), swiglu_reference(x.to(at::kDouble)), "act");
  const at::Tensor expected =
      finite_differences([&](const at::Tensor& p) { return (swiglu_reference(p) * dy.to(at::kDouble)).sum(); }, x);
  swiglu_backward(cpu_device(), dy, x);
  expect_close(x, expected, "dx");
}

TEST(SwiGlu, LargeInputsStayFinite) {
  const at::Tensor x = at::tensor({-200.0f, 200.0f, -1e30f, 1.0f, 1.0f, 1.0f}).view({1, 6});
  const at::Tensor act = swiglu_forward(cpu_device(), x);
  EXPECT_TRUE(at::isfinite(act).all().item<bool>());
  EXPECT_NEAR(act[0][0].item<float>(), 0.0f, 1e-30f);
  EXPECT_EQ(act[0][1].item<float>(), 200.0f);
}

struct RopeCase {
  HeadShape shape{4, 2, 6};
  std::int64_t rows = 3;
  RopeTable table{at::cos(test_tensor({3, 3}, 7)), at::sin(test_tensor({3, 3}, 7))};
  at::Tensor q_norm, k_norm;

  at::Tensor reference(const at::Tensor& qkv) const {
    return norm_rope_reference(qkv, shape, table, q_norm, k_norm, 1e-6);
  }
};

void check_norm_rope(bool norm) {
  RopeCase c;
  if (norm) {
    c.q_norm = test_tensor({6}, 8);
    c.k_norm = test_tensor({6}, 9);
  }
  const at::Tensor qkv = test_tensor({3, 48}, 10), dy = test_tensor({3, 48}, 11);
  at::Tensor work = qkv.clone();
  const Heads heads = norm_rope_forward(cpu_device(), work, c.shape, c.table, c.q_norm, c.k_norm, 1e-6);
  const at::Tensor y = at::cat({heads.q.flatten(1), heads.k.flatten(1), heads.v.flatten(1)}, 1);
  expect_close(y, c.reference(qkv.to(at::kDouble)), "heads");
  at::Tensor dqkv = dy.clone();
  norm_rope_backward(cpu_device(), dqkv, work, heads, c.shape, c.table, c.q_norm, c.k_norm);
  const at::Tensor expected =
      finite_differences([&](const at::Tensor& p) { return (c.reference(p) * dy.to(at::kDouble)).sum(); }, qkv);
  expect_close(dqkv, expected, "dqkv");
}

TEST(NormRope, WithoutNorm) {
  check_norm_rope(false);
}
TEST(NormRope, WithNorm) {
  check_norm_rope(true);
}

void check_attention(const std::vector<std::int32_t>& cu, std::int64_t window, const HeadShape& s, bool differences) {
  const std::int64_t rows = cu.back(), width = (s.heads + 2 * s.kv_heads) * s.head_dim;
  const at::Tensor qkv = test_tensor({rows, width}, 12), grad_o = test_tensor({rows, s.heads * s.head_dim}, 13);
  const AttentionRanges ranges = attention_ranges(cpu_device(), cu);
  const auto head = [&](const at::Tensor& x, std::int64_t column, std::int64_t n) {
    return x.narrow(1, column * s.head_dim, n * s.head_dim).view({rows, n, s.head_dim});
  };
  const at::Tensor q = head(qkv, 0, s.heads), k = head(qkv, s.heads, s.kv_heads),
                   v = head(qkv, s.heads + s.kv_heads, s.kv_heads);
  const auto reference = [&](const at::Tensor& x) {
    return attention_reference(head(x, 0, s.heads), head(x, s.heads, s.kv_heads),
                               head(x, s.heads + s.kv_heads, s.kv_heads), ranges, window);
  };
  const auto run = [&](at::Tensor& dqkv) {
    std::vector<at::Tensor> saved;
    const at::Tensor o = cpu_device().attention_forward(q, k, v, ranges, window, saved);
    dqkv = at::empty({rows, width}, at::kFloat);
    cpu_device().attention_backward(grad_o, q, k, v, o, ranges, window, saved, dqkv);
    return o;
  };
  at::Tensor dqkv, again;
  const at::Tensor o = run(dqkv);
  expect_close(o, reference(qkv.to(at::kDouble)), "o");
  EXPECT_TRUE(same_bits(o, run(again)));
  EXPECT_TRUE(same_bits(dqkv, again));
  at::Tensor expected;
  const auto loss = [&](const at::Tensor& p) { return (reference(p) * grad_o.to(at::kDouble)).sum(); };
  if (differences) {
    expected = finite_differences(loss, qkv);
  } else {
    const at::Tensor leaf = qkv.to(at::kDouble).requires_grad_();
    loss(leaf).backward();
    expected = leaf.grad();
  }
  expect_close(dqkv, expected, "dqkv", 5e-6);
}

TEST(Attention, RaggedSequences) {
  check_attention({0, 3, 4, 9}, 0, {2, 2, 4}, true);
}
TEST(Attention, EqualLengthsShareACall) {
  check_attention({0, 4, 8, 12, 12, 14}, 0, {4, 2, 4}, true);
}
TEST(Attention, GroupedHeads) {
  check_attention({0, 7}, 0, {9, 3, 4}, true);
}
TEST(Attention, Window) {
  check_attention({0, 2, 11}, 3, {2, 1, 4}, true);
}
TEST(Attention, WindowOverSeveralTiles) {
  check_attention({0, 1100, 1110}, 300, {2, 1, 8}, false);
}
TEST(Attention, Long) {
  check_attention({0, 600, 1200, 1300}, 0, {4, 2, 16}, false);
}

TEST(Lora, SegmentsOfUnequalRank) {
  const std::int64_t rows = 9, in = 12, out = 10;
  const at::Tensor x = test_tensor({rows, in}, 20), y0 = test_tensor({rows, out}, 21),
                   dy = test_tensor({rows, out}, 22);
  std::array<AdapterView, 2> adapters;
  for (std::size_t i = 0; i < 2; ++i) {
    const std::int64_t rank = i == 0 ? 8 : 16;
    adapters[i].scale = 32.0 / static_cast<double>(rank);
    LoraFactors& f = adapters[i].unembed;
    f.a = test_tensor({2 * rank, in}, 23 + i);
    f.grad_a = at::zeros_like(f.a);
    for (std::int64_t part = 0; part < 2; ++part) {
      const at::Tensor b = test_tensor({part == 0 ? 6 : 4, rank}, 25 + i * 2 + part);
      f.parts.push_back({part == 0 ? 0 : 6, part == 0 ? 6 : 10, part * rank, rank, b, at::zeros_like(b)});
    }
  }
  const std::vector<LoraSegment> segments = {{0, 4, &adapters[0]}, {4, 5, nullptr}, {5, 9, &adapters[1]}};
  const LoraView view = LoraView::of_unembedding(segments);
  at::Tensor y = y0.clone(), dx = at::zeros_like(x);
  const auto u = lora_forward(view, x, y);
  lora_backward(view, x, u, dy, dx);

  const auto delta = [&](const AdapterView& adapter) {  // (out, in)
    std::vector<at::Tensor> parts;
    for (const LoraPart& p : adapter.unembed.parts) {
      const at::Tensor a = adapter.unembed.a.narrow(0, p.rank_begin, p.rank).to(at::kDouble);
      parts.push_back(at::mm(p.b.to(at::kDouble), a) * adapter.scale);
    }
    return at::cat(parts, 0);
  };
  for (const LoraSegment& s : segments) {
    const std::int64_t n = s.row_end - s.row_begin;
    const at::Tensor xs = x.narrow(0, s.row_begin, n).to(at::kDouble),
                     dys = dy.narrow(0, s.row_begin, n).to(at::kDouble);
    if (s.adapter == nullptr) {
      EXPECT_TRUE(same_bits(y.narrow(0, s.row_begin, n), y0.narrow(0, s.row_begin, n)));
      continue;
    }
    const at::Tensor w = delta(*s.adapter);
    expect_close(y.narrow(0, s.row_begin, n), y0.narrow(0, s.row_begin, n).to(at::kDouble) + at::mm(xs, w.t()), "y");
    expect_close(dx.narrow(0, s.row_begin, n), at::mm(dys, w), "dx");
    const at::Tensor dw = at::mm(dys.t(), xs) * s.adapter->scale;
    for (const LoraPart& p : s.adapter->unembed.parts) {
      const at::Tensor a = s.adapter->unembed.a.narrow(0, p.rank_begin, p.rank).to(at::kDouble);
      const at::Tensor dw_part = dw.narrow(0, p.out_begin, p.out_end - p.out_begin);
      expect_close(p.grad_b, at::mm(dw_part, a.t()), "grad_b");
      expect_close(s.adapter->unembed.grad_a.narrow(0, p.rank_begin, p.rank), at::mm(p.b.to(at::kDouble).t(), dw_part),
                   "grad_a");
    }
  }
}

TEST(TokenLogprobs, SeveralTargetsPerRow) {
  const at::Tensor logits = test_tensor({3, 50}, 30, 5.0);
  const std::vector<std::int32_t> targets = {4, 4, 7, 49, 0};
  const std::vector<std::int64_t> offsets = {0, 1, 3, 5};
  const std::vector<float> dlogprobs = {-1.0f, 0.5f, 2.0f, 0.0f, 0.0f};
  const RowTargets rows{targets, offsets};
  const auto reference = [&](const at::Tensor& x) { return token_logprobs_reference(x, rows); };
  at::Tensor work = logits.clone();
  const at::Tensor lse = logsumexp_rows(cpu_device(), work);
  at::Tensor logprobs = at::empty({5}, at::kFloat);
  gather_logprobs(cpu_device(), work, lse, rows, 0, logprobs.data_ptr<float>());
  EXPECT_LT((logprobs.to(at::kDouble) - reference(logits.to(at::kDouble))).abs().max().item<double>(), 2e-6);
  logprobs_backward(cpu_device(), work, lse, rows, 0, dlogprobs.data());
  const at::Tensor weights = at::tensor(dlogprobs).to(at::kDouble);
  expect_close(work, finite_differences([&](const at::Tensor& p) { return (reference(p) * weights).sum(); }, logits),
               "dlogits");
  EXPECT_EQ(work[2].abs().sum().item<float>(), 0.0f);
}

TEST(TokenLogprobs, ZeroGradientIsExactlyZeroWhateverTheLogits) {
  at::Tensor logits = at::full({1, 20}, std::numeric_limits<float>::quiet_NaN());
  const std::vector<std::int32_t> targets = {3};
  const std::vector<std::int64_t> offsets = {0, 1};
  const float zero = 0.0f;
  logprobs_backward(cpu_device(), logits, at::zeros({1}), {targets, offsets}, 0, &zero);
  EXPECT_EQ(logits.abs().sum().item<float>(), 0.0f);
}

TEST(TokenLogprobs, LogSumExpIsAccurateOverALargeVocabulary) {
  const at::Tensor logits = test_tensor({2, 151936}, 31, 4.0) + 50.0;
  const at::Tensor expected = at::logsumexp(logits.to(at::kDouble), {1});
  EXPECT_LT((logsumexp_rows(cpu_device(), logits).to(at::kDouble) - expected).abs().max().item<double>(), 4e-6);
}

TEST(Linear, BiasResidualAndBackward) {
  BaseLinear linear{test_tensor({7, 5}, 40), test_tensor({7}, 41)};
  const at::Tensor x = test_tensor({3, 5}, 42), residual = test_tensor({3, 7}, 43);
  const at::Tensor expected = at::mm(x, linear.weight.t()) + linear.bias;
  expect_close(linear_forward(linear, x), expected, "y");
  expect_close(linear_forward_residual(linear, x, residual), expected + residual, "residual");
  at::Tensor out = at::empty({3, 7});
  linear_forward_out(linear, x, out);
  expect_close(out, expected, "out");
  expect_close(linear_backward(linear, residual), at::mm(residual, linear.weight), "dx");
}

TEST(Determinism, EveryOpTwice) {
  const at::Tensor x = test_tensor({600, 256}, 50), w = test_tensor({256}, 51);
  at::Tensor rstd_a, rstd_b;
  EXPECT_TRUE(same_bits(rms_norm_forward(cpu_device(), x, w, 1e-5, rstd_a),
                        rms_norm_forward(cpu_device(), x, w, 1e-5, rstd_b)));
  EXPECT_TRUE(same_bits(swiglu_forward(cpu_device(), x), swiglu_forward(cpu_device(), x)));
  EXPECT_TRUE(same_bits(logsumexp_rows(cpu_device(), x), logsumexp_rows(cpu_device(), x)));
  const BaseLinear linear{test_tensor({384, 256}, 52), {}};
  EXPECT_TRUE(same_bits(linear_forward(linear, x), linear_forward(linear, x)));
  const at::Tensor dy = test_tensor({600, 384}, 53);
  EXPECT_TRUE(same_bits(linear_backward(linear, dy), linear_backward(linear, dy)));
}

}  // namespace
}  // namespace ht::engine
