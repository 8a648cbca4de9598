#pragma once

// What the engine runs on. Header-only and abstract: a device may come from a library that is loaded at run time
// (cuda_library.h) and needs no symbol of this program.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/kernel_table.h"

namespace ht::engine {

// Which rows of packed q and k belong together: sequence i has the queries [q[i], q[i + 1]) and the keys
// [k[i], k[i + 1]). Its queries are its last tokens, and a query sees the keys up to its own position.
struct AttentionRanges {
  std::span<const std::int32_t> q, k;   // [num_sequences + 1]
  at::Tensor q_on_device, k_on_device;  // the same, int32
};

class Device {
 public:
  struct Memory {
    std::uint64_t free = 0, total = 0;  // bytes
  };

  virtual ~Device() = default;

  // For people: "cpu, 2 threads", "cuda: NVIDIA H100 80GB HBM3".
  virtual std::string name() const = 0;
  virtual at::Device torch_device() const = 0;
  // Of the base's weights and of activations; adapters, their gradients and moments are float32 on every device.
  virtual at::ScalarType compute_dtype() const = 0;
  // Of compute_dtype().
  virtual const HtKernelTable& kernels() const = 0;
  virtual HtStream stream() const = 0;
  virtual Memory memory() const = 0;
  // The sampler's steps of few rows run on the panel kernels of kernels/cpu/decode_kernels.h.
  virtual bool has_decode_kernels() const = 0;

  // Causal attention over packed sequences; query heads share key/value heads in groups (GQA).
  //   q (Tq, heads, d), k and v (Tk, kv_heads, d): compute dtype, last dimension contiguous, rows may be strided.
  //   `window` > 0: position i sees the positions j with i - window < j <= i (transformers' sliding_window); the scores
  //   are scaled by 1 / sqrt(d).
  // Returns o (Tq, heads · d), contiguous. `saved` receives what the backward needs.
  virtual at::Tensor attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const AttentionRanges& ranges, std::int64_t window,
                                       std::vector<at::Tensor>& saved) const = 0;
  // For ranges with as many queries as keys: writes the gradients of q, k and v into dqkv (T, (heads + 2 kv_heads) ·
  // d), side by side, given do (T, heads · d). The same call gives the same bits.
  virtual void attention_backward(const at::Tensor& grad_o, const at::Tensor& q, const at::Tensor& k,
                                  const at::Tensor& v, const at::Tensor& o, const AttentionRanges& ranges,
                                  std::int64_t window, const std::vector<at::Tensor>& saved,
                                  at::Tensor& dqkv) const = 0;

  at::TensorOptions options() const { return at::TensorOptions(torch_device()).dtype(compute_dtype()); }
  at::TensorOptions float_options() const { return at::TensorOptions(torch_device()).dtype(at::kFloat); }
};

}  // namespace ht::engine
