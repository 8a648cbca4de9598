// libht_cuda.so: the CUDA device. It links torch_cuda and the kernels of kernels/cuda, and uses no symbol of the
// program that loads it.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>

#include "engine/device/cuda_entry.h"
#include "kernels/cuda/cuda_table.h"

namespace ht::engine {

namespace {

constexpr std::int64_t kHeadDimStep = 8;  // flash attention takes head dimensions that are multiples of 8

std::int64_t longest(std::span<const std::int32_t> cu_seqlens) {
  std::int64_t length = 0;
  for (std::size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    length = std::max<std::int64_t>(length, cu_seqlens[i + 1] - cu_seqlens[i]);
  }
  return length;
}

at::Tensor padded(const at::Tensor& x) {
  const std::int64_t missing = (kHeadDimStep - x.size(2) % kHeadDimStep) % kHeadDimStep;
  return missing == 0 ? x : at::constant_pad_nd(x, {0, missing});
}

std::optional<std::int64_t> window_left(std::int64_t window) {
  return window > 0 ? std::optional<std::int64_t>(window - 1) : std::nullopt;
}

std::optional<std::int64_t> window_right(std::int64_t window) {
  return window > 0 ? std::optional<std::int64_t>(0) : std::nullopt;
}

// The backward kernel without atomic additions, for one call: ATen takes it while deterministic algorithms are asked
// for.
class DeterministicScope {
 public:
  DeterministicScope()
      : before_(at::globalContext().deterministicAlgorithms()),
        before_warns_(at::globalContext().deterministicAlgorithmsWarnOnly()),
        before_fills_(at::globalContext().deterministicFillUninitializedMemory()) {
    at::globalContext().setDeterministicAlgorithms(true, false);
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  }
  ~DeterministicScope() {
    at::globalContext().setDeterministicAlgorithms(before_, before_warns_);
    at::globalContext().setDeterministicFillUninitializedMemory(before_fills_);
  }
  DeterministicScope(const DeterministicScope&) = delete;
  DeterministicScope& operator=(const DeterministicScope&) = delete;

 private:
  bool before_, before_warns_, before_fills_;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int index, const std::string& model)
      : device_(at::kCUDA, static_cast<at::DeviceIndex>(index)), name_("cuda: " + model) {}

  std::string name() const override { return name_; }
  at::Device torch_device() const override { return device_; }
  at::ScalarType compute_dtype() const override { return at::kBFloat16; }
  const HtKernelTable& kernels() const override { return *ht_cuda_kernels(); }
  HtStream stream() const override { return c10::cuda::getCurrentCUDAStream(device_.index()).stream(); }
  Memory memory() const override {
    // What the allocator holds without need is free too.
    c10::cuda::CUDACachingAllocator::emptyCache();
    std::size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) != cudaSuccess) return {};
    return {free, total};
  }
  bool has_decode_kernels() const override { return false; }

  // `saved`: log-sum-exp, the random state that ATen hands through, and its unused companion.
  at::Tensor attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const AttentionRanges& ranges, std::int64_t window,
                               std::vector<at::Tensor>& saved) const override {
    const std::int64_t rows = q.size(0), heads = q.size(1), d = q.size(2);
    const auto [o, lse, state, unused, mask] = at::_flash_attention_forward(
        padded(q), padded(k), padded(v), ranges.q_on_device, ranges.k_on_device, longest(ranges.q), longest(ranges.k),
        0.0, true, false, scale(d), window_left(window), window_right(window));
    saved = {lse, state, unused};
    return o.narrow(2, 0, d).reshape({rows, heads * d});
  }

  void attention_backward(const at::Tensor& grad_o, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& o, const AttentionRanges& ranges, std::int64_t window,
                          const std::vector<at::Tensor>& saved, at::Tensor& dqkv) const override {
    const std::int64_t rows = q.size(0), heads = q.size(1), kv_heads = k.size(1), d = q.size(2);
    const DeterministicScope deterministic;
    const auto [dq, dk, dv] = at::_flash_attention_backward(
        padded(grad_o.view({rows, heads, d})), padded(q), padded(k), padded(v), padded(o.view({rows, heads, d})),
        saved[0], ranges.q_on_device, ranges.k_on_device, longest(ranges.q), longest(ranges.k), 0.0, true, saved[1],
        saved[2], scale(d), window_left(window), window_right(window));
    const auto write = [&](const at::Tensor& gradient, std::int64_t head, std::int64_t count) {
      dqkv.narrow(1, head * d, count * d).view({rows, count, d}).copy_(gradient.narrow(2, 0, d));
    };
    write(dq, 0, heads);
    write(dk, heads, kv_heads);
    write(dv, heads + kv_heads, kv_heads);
  }

 private:
  // Of the true head dimension: the padding adds nothing to the scores.
  static double scale(std::int64_t d) { return 1.0 / std::sqrt(static_cast<double>(d)); }

  at::Device device_;
  std::string name_;
};

CudaEntryResult open_device() {
  static std::string reason;
  const auto fail = [](const std::string& text) -> CudaEntryResult {
    reason = text;
    return {nullptr, reason.c_str()};
  };
  constexpr int kIndex = 0;  // the first that CUDA_VISIBLE_DEVICES leaves
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    return fail(std::string("the CUDA runtime finds no device: ") + cudaGetErrorString(error));
  }
  cudaDeviceProp properties{};
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, kIndex); error != cudaSuccess) {
    return fail(std::string("cudaGetDeviceProperties: ") + cudaGetErrorString(error));
  }
  if (properties.major < 8) {
    return fail(std::string(properties.name) + " has the compute capability " + std::to_string(properties.major) + "." +
                std::to_string(properties.minor) + ", at least 8.0 (Ampere) is needed");
  }
  try {
    // The same GEMM gives the same bits (cuBLAS's own condition), and sums in float32.
    ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 0);
    at::globalContext().setAllowBF16ReductionCuBLAS(false, true);
    at::zeros({1}, at::TensorOptions(at::Device(at::kCUDA, kIndex)));  // ATen's own start, and its own complaint
  } catch (const std::exception& error) {
    const std::string text = error.what();
    return fail(text.substr(0, text.find('\n')));
  }
  static const CudaDevice device(kIndex, properties.name);
  return {&device, ""};
}

}  // namespace

}  // namespace ht::engine

extern "C" __attribute__((visibility("default"))) ht::engine::CudaEntryResult ht_cuda_device(int version) {
  if (version != ht::engine::kCudaEntryVersion) {
    return {nullptr, "libht_cuda.so is of another build than this program"};
  }
  return ht::engine::open_device();
}
