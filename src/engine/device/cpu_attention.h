#pragma once

#include "engine/device/device.h"

namespace ht::engine {

// Device::attention_forward and attention_backward by ATen's flash attention for CPUs, in any dtype that it takes.
at::Tensor cpu_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const AttentionRanges& ranges, std::int64_t window, std::vector<at::Tensor>& saved);
void cpu_attention_backward(const at::Tensor& grad_o, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& o, const AttentionRanges& ranges, std::int64_t window,
                            const std::vector<at::Tensor>& saved, at::Tensor& dqkv);

}  // namespace ht::engine
