// Every kernel of every device's table, and its attention, against the references of the ops: the CPU's kernels, the
// plain reference tables, and CUDA's where a GPU is present. `--gtest_filter=*Cuda*` runs the last alone.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "engine/device/cpu.h"
#include "engine/device/cuda_library.h"
#include "engine/ops/attention.h"
#include "engine/ops/gradient_check.h"
#include "engine/ops/linear.h"
#include "engine/ops/rms_norm.h"
#include "engine/ops/rope.h"
#include "engine/ops/swiglu.h"
#include "engine/ops/token_logprobs.h"

namespace ht::engine {
namespace {

enum class Which { cpu, reference_float32, reference_bfloat16, cuda };

std::string name_of(const testing::TestParamInfo<Which>& info) {
  switch (info.param) {
    case Which::cpu:
      return "Cpu";
    case Which::reference_float32:
      return "ReferenceFloat32";
    case Which::reference_bfloat16:
      return "ReferenceBfloat16";
    case Which::cuda:
      break;
  }
  return "Cuda";
}

// Before any test: ATen remembers what it found when it first asked for CUDA.
class LoadCudaFirst : public testing::Environment {
  void SetUp() override {
    std::string why_not;
    load_cuda_device(why_not);
  }
};
[[maybe_unused]] const testing::Environment* const kLoadCudaFirst =
    testing::AddGlobalTestEnvironment(new LoadCudaFirst);

class DeviceTest : public testing::TestWithParam<Which> {
 protected:
  void SetUp() override {
    std::string why_not;
    switch (GetParam()) {
      case Which::cpu:
        device = &cpu_device();
        break;
      case Which::reference_float32:
        device = &reference_device(at::kFloat);
        break;
      case Which::reference_bfloat16:
        device = &reference_device(at::kBFloat16);
        break;
      case Which::cuda:
        device = load_cuda_device(why_not);
        if (device == nullptr) GTEST_SKIP() << "no CUDA: " << why_not;
    }
  }

  at::Tensor random(at::IntArrayRef shape, std::uint64_t seed, double scale = 1.0) const {
    return test_tensor(shape, seed, scale).to(device->options());
  }
  static at::Tensor exact(const at::Tensor& x) { return x.cpu().to(at::kDouble); }
  // A bfloat16 result is rounded once: by 2^-9 at most, 0.2 % on average over a tensor.
  void expect_near(const at::Tensor& actual, const at::Tensor& expected, const std::string& what,
                   double factor = 1.0) const {
    expect_close(actual.cpu(), expected, what, factor * (actual.dtype() == at::kFloat ? 2e-6 : 3e-3));
  }
  // d(sum(f(x) · dy))/dx in double, by autograd.
  template <typename F>
  static at::Tensor gradient(const F& f, const at::Tensor& x, const at::Tensor& dy) {
    const at::Tensor leaf = exact(x).requires_grad_();
    (f(leaf) * exact(dy)).sum().backward();
    return leaf.grad();
  }

  const Device* device = nullptr;
};

// Widths with and without vector loads, rows beyond a block of threads.
TEST_P(DeviceTest, RmsNorm) {
  for (const std::int64_t n : {24, 576, 1021}) {
    const at::Tensor x = random({37, n}, 1), w = random({n}, 2), dy = random({37, n}, 3), residual = random({37, n}, 4);
    const auto f = [&](const at::Tensor& p) { return rms_norm_reference(p, exact(w), 1e-5); };
    at::Tensor rstd;
    const at::Tensor y = rms_norm_forward(*device, x, w, 1e-5, rstd);
    expect_near(y, f(exact(x)), "y");
    EXPECT_EQ(rstd.scalar_type(), at::kFloat);
    EXPECT_TRUE(same_bits(y, rms_norm_apply(*device, x, w, rstd)));
    at::Tensor dx = residual.clone(), again = residual.clone();
    rms_norm_backward(*device, dy, x, w, rstd, dx);
    expect_near(dx, gradient(f, x, dy) + exact(residual), "dx");
    rms_norm_backward(*device, dy, x, w, rstd, again);
    EXPECT_TRUE(same_bits(dx, again));
  }
}

TEST_P(DeviceTest, NormRope) {
  for (const bool norm : {false, true}) {
    for (const std::int64_t dim : {20, 64, 128}) {
      const HeadShape shape{6, 2, dim};
      const std::int64_t rows = 19, width = 10 * dim;
      const at::Tensor angles = test_tensor({rows, dim / 2}, 5);
      const RopeTable host{at::cos(angles), at::sin(angles)};
      const RopeTable table{host.cos.to(device->torch_device()), host.sin.to(device->torch_device())};
      const at::Tensor q_norm = norm ? random({dim}, 6) : at::Tensor(), k_norm = norm ? random({dim}, 7) : at::Tensor();
      const at::Tensor qkv = random({rows, width}, 8), dy = random({rows, width}, 9);
      const at::Tensor exact_q = norm ? exact(q_norm) : q_norm, exact_k = norm ? exact(k_norm) : k_norm;
      const auto f = [&](const at::Tensor& p) { return norm_rope_reference(p, shape, host, exact_q, exact_k, 1e-6); };
      at::Tensor work = qkv.clone();
      const Heads heads = norm_rope_forward(*device, work, shape, table, q_norm, k_norm, 1e-6);
      expect_near(at::cat({heads.q.flatten(1), heads.k.flatten(1), heads.v.flatten(1)}, 1), f(exact(qkv)), "heads");
      at::Tensor dqkv = dy.clone();
      norm_rope_backward(*device, dqkv, work, heads, shape, table, q_norm, k_norm);
      expect_near(dqkv, gradient(f, qkv, dy), "dqkv");
    }
  }
}

TEST_P(DeviceTest, SwiGlu) {
  for (const std::int64_t n : {17, 512}) {
    at::Tensor x = random({33, 2 * n}, 10, 3.0);
    const at::Tensor dy = random({33, n}, 11);
    expect_near(swiglu_forward(*device, x), swiglu_reference(exact(x)), "act");
    const at::Tensor expected = gradient(swiglu_reference, x, dy);
    swiglu_backward(*device, dy, x);
    expect_near(x, expected, "dx");
  }
}

TEST_P(DeviceTest, TokenLogprobs) {
  for (const std::int64_t vocab : {50, 32003}) {
    const at::Tensor logits = test_tensor({4, vocab}, 12, 4.0).to(device->float_options());
    const std::vector<std::int32_t> targets = {9, 3, 4, 7, 49, 7};  // the third row has its target twice
    const std::vector<std::int64_t> offsets = {0, 1, 3, 4, 6};
    const std::vector<float> dlogprobs = {0.0f, 0.5f, 2.0f, -1.0f, 1.0f, -0.25f};
    const RowTargets rows{targets, offsets};
    const at::Tensor lse = logsumexp_rows(*device, logits);
    EXPECT_LT((exact(lse) - at::logsumexp(exact(logits), {1})).abs().max().item<double>(), 4e-6);
    at::Tensor logprobs = at::empty({6}, at::kFloat);
    gather_logprobs(*device, logits, lse, rows, 0, logprobs.data_ptr<float>());
    const at::Tensor expected = token_logprobs_reference(exact(logits), rows);
    EXPECT_LT((exact(logprobs) - expected).abs().max().item<double>(), 4e-6);
    // Rows 1 to 3 of the batch.
    at::Tensor work = logits.narrow(0, 1, 3).clone();
    const at::Tensor d = logprobs_backward(*device, work, lse.narrow(0, 1, 3), rows, 1, dlogprobs.data());
    EXPECT_EQ(d.scalar_type(), device->compute_dtype());
    const auto f = [&](const at::Tensor& p) { return token_logprobs_reference(p, rows); };
    expect_near(d, gradient(f, logits, at::tensor(dlogprobs)).narrow(0, 1, 3), "dlogits");
    at::Tensor bad = at::full({1, vocab}, NAN, device->float_options());
    const at::Tensor zero = logprobs_backward(*device, bad, lse.narrow(0, 0, 1), rows, 0, dlogprobs.data());
    EXPECT_EQ(zero.abs().sum().item<float>(), 0.0f);
  }
}

struct Shape {
  std::int64_t heads, kv_heads, dim, window;
};

TEST_P(DeviceTest, AttentionForwardAndBackward) {
  const std::vector<std::int32_t> cu = {0, 40, 41, 58, 58, 200};
  for (const Shape& s : {Shape{6, 2, 64, 0}, {4, 4, 20, 0}, {4, 1, 128, 7}}) {
    const AttentionRanges ranges = attention_ranges(*device, cu);
    const std::int64_t rows = cu.back(), width = (s.heads + 2 * s.kv_heads) * s.dim;
    const auto part = [&](const at::Tensor& x, std::int64_t first, std::int64_t n) {
      return x.narrow(1, first * s.dim, n * s.dim).view({rows, n, s.dim});
    };
    const auto f = [&](const at::Tensor& x) {
      const AttentionRanges host = attention_ranges(cpu_device(), cu);
      return attention_reference(part(x, 0, s.heads), part(x, s.heads, s.kv_heads),
                                 part(x, s.heads + s.kv_heads, s.kv_heads), host, s.window);
    };
    const at::Tensor qkv = random({rows, width}, 13), grad_o = random({rows, s.heads * s.dim}, 14);
    const at::Tensor q = part(qkv, 0, s.heads), k = part(qkv, s.heads, s.kv_heads),
                     v = part(qkv, s.heads + s.kv_heads, s.kv_heads);
    std::vector<at::Tensor> saved;
    const at::Tensor o = device->attention_forward(q, k, v, ranges, s.window, saved);
    expect_near(o, f(exact(qkv)), "o", 2.0);
    at::Tensor dqkv = at::empty_like(qkv), again = at::empty_like(qkv);
    device->attention_backward(grad_o, q, k, v, o, ranges, s.window, saved, dqkv);
    expect_near(dqkv, gradient(f, qkv, grad_o), "dqkv", 4.0);
    device->attention_backward(grad_o, q, k, v, o, ranges, s.window, saved, again);
    EXPECT_TRUE(same_bits(dqkv, again));
  }
}

// The sampler's steps: fewer queries than keys.
TEST_P(DeviceTest, AttentionOverCachedKeys) {
  const std::vector<std::int32_t> cu_q = {0, 1, 6, 25}, cu_k = {0, 30, 70, 89};
  const AttentionRanges ranges = attention_ranges(*device, cu_q, cu_k),
                        host = attention_ranges(cpu_device(), cu_q, cu_k);
  for (const std::int64_t window : {0, 9}) {
    const at::Tensor q = random({25, 4, 64}, 15), k = random({89, 2, 64}, 16), v = random({89, 2, 64}, 17);
    std::vector<at::Tensor> saved;
    expect_near(device->attention_forward(q, k, v, ranges, window, saved),
                attention_reference(exact(q), exact(k), exact(v), host, window), "o", 2.0);
  }
}

TEST_P(DeviceTest, ProductsAccumulateInFloat32) {
  const at::Tensor a = random({70, 600}, 18), b = random({600, 90}, 19);
  const at::Tensor start = test_tensor({70, 90}, 20).to(device->float_options());
  at::Tensor out = start.clone();
  add_product(out, a, b, 1.0, 0.5);
  expect_near(out, exact(start) + 0.5 * at::mm(exact(a), exact(b)), "float32 result");
  const BaseLinear linear{random({90, 600}, 21), {}, {}};
  at::Tensor logits = at::empty({70, 90}, device->float_options());
  linear_forward_out(linear, a, logits);
  expect_near(logits, at::mm(exact(a), exact(linear.weight).t()), "logits");
}

INSTANTIATE_TEST_SUITE_P(Devices, DeviceTest,
                         testing::Values(Which::cpu, Which::reference_float32, Which::reference_bfloat16, Which::cuda),
                         name_of);

}  // namespace
}  // namespace ht::engine
