#include "engine/ops/packed_weight.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sys/mman.h>

#include <atomic>

#include "engine/ops/parallel_rows.h"

namespace ht::engine {

namespace {

constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;

// Fewer misses of the address cache while the weights stream by.
void prefer_huge_pages(const at::Tensor& tensor) {
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data_ptr());
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = (begin + tensor.nbytes()) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

PackedWeight pack(const at::Tensor& weight, HtWeightType type) {
  PackedWeight packed{{}, type, weight.size(0), weight.size(1)};
  const auto scalar = type == HT_WEIGHT_F32 ? at::kFloat : type == HT_WEIGHT_BF16 ? at::kBFloat16 : at::kHalf;
  packed.data = at::empty({ht_panel_elements(packed.n, packed.k)}, scalar);
  prefer_huge_pages(packed.data);
  const float* from = weight.const_data_ptr<float>();
  void* to = packed.data.data_ptr();
  std::atomic<bool> exact = true;
  parallel_rows(packed.panels(), packed.k * HT_PANEL_COLUMNS, [&](std::int64_t begin, std::int64_t end) {
    if (exact && ht_pack_panels(from, packed.n, packed.k, type, to, begin, end) == 0) exact = false;
  });
  return exact ? packed : PackedWeight{};
}

}  // namespace

PackedWeight pack_weight(const at::Tensor& weight) {
  return pack(weight, HT_WEIGHT_F32);
}

PackedWeight pack_weight_16_bits(const at::Tensor& weight) {
  PackedWeight packed = pack(weight, HT_WEIGHT_BF16);
  return packed.defined() ? packed : pack(weight, HT_WEIGHT_F16);
}

HtPanelGemm panel_gemm(const PackedWeight& weight, const float* x, std::int64_t ldx, std::int64_t m, float* y,
                       std::int64_t ldy) {
  HtPanelGemm gemm{};
  gemm.x = x;
  gemm.ldx = ldx;
  gemm.w = weight.data.const_data_ptr();
  gemm.w_type = weight.type;
  gemm.y = y;
  gemm.ldy = ldy;
  gemm.m = m;
  gemm.n = weight.n;
  gemm.k = weight.k;
  gemm.alpha = 1.0f;
  return gemm;
}

}  // namespace ht::engine
