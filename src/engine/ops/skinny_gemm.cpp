#include "engine/ops/skinny_gemm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels/cpu/decode_kernels.h"

namespace ht::engine {

namespace {

// Waking a thread costs about 10 µs, in which one does this many multiply-adds at least.
constexpr std::int64_t kGrainWork = 200'000;

}  // namespace

bool is_skinny(const at::Tensor& x) {
  return x.size(0) <= HT_SKINNY_MAX_M && x.stride(1) == 1 && x.scalar_type() == at::kFloat && x.is_cpu();
}

void skinny_gemm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& residual,
                 float alpha, const at::Tensor& out) {
  HtSkinnyGemm gemm{};
  gemm.m = x.size(0);
  gemm.k = x.size(1);
  gemm.n = weight.size(0);
  gemm.x = x.data_ptr<float>();
  gemm.ldx = x.stride(0);
  gemm.w = weight.const_data_ptr<float>();
  gemm.bias = bias.defined() ? bias.data_ptr<float>() : nullptr;
  if (residual.defined()) {
    gemm.residual = residual.data_ptr<float>();
    gemm.ld_residual = residual.stride(0);
  }
  gemm.y = out.data_ptr<float>();
  gemm.ldy = out.stride(0);
  gemm.alpha = alpha;
  const std::int64_t grain = std::max<std::int64_t>(16, kGrainWork / std::max<std::int64_t>(1, gemm.m * gemm.k));
  at::parallel_for(0, gemm.n, grain, [&](std::int64_t begin, std::int64_t end) { ht_skinny_gemm(&gemm, begin, end); });
}

}  // namespace ht::engine
