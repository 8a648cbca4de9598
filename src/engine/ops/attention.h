#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "engine/device/device.h"

namespace ht::engine {

// Attention itself is the device's (Device::attention_forward).

// The ranges of packed queries and keys, which must live as long as the result; k empty: the keys lie as the queries
// do.
AttentionRanges attention_ranges(const Device& device, std::span<const std::int32_t> q,
                                 std::span<const std::int32_t> k = {});

// softmax(q kᵀ / sqrt(d)) v with the scores written out, of the arguments of Device::attention_forward, in q's dtype.
at::Tensor attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const AttentionRanges& ranges, std::int64_t window);

}  // namespace ht::engine
