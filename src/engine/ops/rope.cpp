#include "engine/ops/rope.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <type_traits>

#include "engine/ops/parallel_rows.h"
#include "engine/ops/rms_norm.h"

namespace ht::engine {

using model_spec::ModelSpec;
using model_spec::RopeSpec;
using model_spec::RopeType;

namespace {

// base^(2 i / dim), i < dim / 2, as torch computes it: the exponent and the power in float32.
std::vector<float> powers(double base, int dim) {
  std::vector<float> result(static_cast<std::size_t>(dim / 2));
  for (int i = 0; i < dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    result[static_cast<std::size_t>(i)] = std::pow(static_cast<float>(base), exponent);
  }
  return result;
}

void llama3(const RopeSpec& rope, std::vector<float>& inverse) {
  const double context = rope.original_max_position_embeddings;
  const double low_wavelength = context / rope.low_freq_factor;
  const double high_wavelength = context / rope.high_freq_factor;
  for (float& f : inverse) {
    const double wavelength = 2.0 * std::numbers::pi / f;
    if (wavelength > low_wavelength) {
      f = static_cast<float>(f / rope.factor);
    } else if (wavelength >= high_wavelength) {
      const double smooth =
          (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
      f = static_cast<float>((1.0 - smooth) * f / rope.factor + smooth * f);
    }
  }
}

double yarn_mscale(double scale, double mscale) {
  return scale <= 1.0 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0;
}

double yarn_attention_factor(const RopeSpec& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  if (rope.mscale.value_or(0.0) != 0.0 && rope.mscale_all_dim.value_or(0.0) != 0.0) {
    return yarn_mscale(rope.factor, *rope.mscale) / yarn_mscale(rope.factor, *rope.mscale_all_dim);
  }
  return yarn_mscale(rope.factor, 1.0);
}

// YaRN (Peng et al. 2023): interpolate the slow frequencies, keep the fast ones, ramp between.
void yarn(const RopeSpec& rope, int dim, std::vector<float>& inverse) {
  const auto correction = [&](double rotations) {
    return dim * std::log(rope.original_max_position_embeddings / (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(rope.theta));
  };
  double low = correction(rope.beta_fast), high = correction(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < inverse.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    inverse[i] = static_cast<float>(inverse[i] / rope.factor * ramp + inverse[i] * (1.0 - ramp));
  }
}

double longrope_attention_factor(const RopeSpec& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  if (rope.factor <= 1.0) return 1.0;
  return std::sqrt(1.0 + std::log(rope.factor) / std::log(rope.original_max_position_embeddings));
}

}  // namespace

RopeFrequencies rope_frequencies(const ModelSpec& spec, std::int64_t seq_len) {
  const RopeSpec& rope = spec.rope;
  const int dim = spec.head_dim;
  double base = rope.theta;
  if (rope.type == RopeType::dynamic) {
    const double limit = spec.max_position_embeddings;
    const double length = std::max(static_cast<double>(seq_len), limit);
    base *= std::pow(rope.factor * length / limit - (rope.factor - 1.0), dim / (dim - 2.0));
  }
  RopeFrequencies result;
  result.inverse = powers(base, dim);
  if (rope.type == RopeType::longrope) {
    const bool is_long = seq_len > rope.original_max_position_embeddings;
    const std::vector<double>& factors = is_long ? rope.long_factor : rope.short_factor;
    for (std::size_t i = 0; i < result.inverse.size(); ++i) {
      result.inverse[i] = 1.0f / (static_cast<float>(factors[i]) * result.inverse[i]);
    }
    result.scaling = static_cast<float>(longrope_attention_factor(rope));
    return result;
  }
  for (float& f : result.inverse) f = 1.0f / f;
  switch (rope.type) {
    case RopeType::linear:
      for (float& f : result.inverse) f /= static_cast<float>(rope.factor);
      break;
    case RopeType::llama3:
      llama3(rope, result.inverse);
      break;
    case RopeType::yarn:
      yarn(rope, dim, result.inverse);
      result.scaling = static_cast<float>(yarn_attention_factor(rope));
      break;
    default:
      break;
  }
  return result;
}

RopeTable rope_table(const ModelSpec& spec, const PackedSequences& batch) {
  const std::int64_t half = spec.head_dim / 2;
  RopeTable table{at::empty({batch.num_tokens(), half}, at::kFloat), at::empty({batch.num_tokens(), half}, at::kFloat)};
  float* cos = table.cos.data_ptr<float>();
  float* sin = table.sin.data_ptr<float>();
  const bool by_length = spec.rope.type == RopeType::dynamic || spec.rope.type == RopeType::longrope;
  RopeFrequencies frequencies = rope_frequencies(spec, 0);
  for (std::int64_t s = 0; s < batch.num_sequences(); ++s) {
    const std::int64_t begin = batch.cu_seqlens[s], end = batch.cu_seqlens[s + 1];
    if (begin == end) continue;
    if (by_length) frequencies = rope_frequencies(spec, batch.positions[end - 1] + std::int64_t{1});
    at::parallel_for(begin, end, std::max<std::int64_t>(1, 2048 / half), [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t row = from; row < to; ++row) {
        const float position = static_cast<float>(batch.positions[row]);
        for (std::int64_t j = 0; j < half; ++j) {
          const float angle = position * frequencies.inverse[static_cast<std::size_t>(j)];
          cos[row * half + j] = std::cos(angle) * frequencies.scaling;
          sin[row * half + j] = std::sin(angle) * frequencies.scaling;
        }
      }
    });
  }
  return table;
}

namespace {

HtNormRope kernel_arguments(const RopeTable& rope, const at::Tensor& norm, double eps, std::int64_t heads,
                            std::int64_t head_dim) {
  return {heads,
          head_dim,
          rope.cos.const_data_ptr<float>(),
          rope.sin.const_data_ptr<float>(),
          norm.defined() ? norm.const_data_ptr() : nullptr,
          static_cast<float>(eps)};
}

template <typename Pointer>
Pointer* advance(Pointer* data, std::int64_t elements, const at::Tensor& of) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const std::byte, std::byte>;
  return static_cast<Byte*>(data) + elements * of.element_size();
}

}  // namespace

Heads norm_rope_forward(const Device& device, at::Tensor& qkv, const HeadShape& shape, const RopeTable& rope,
                        const at::Tensor& q_norm, const at::Tensor& k_norm, double eps) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = qkv.size(0), width = qkv.size(1), d = shape.head_dim;
  const std::int64_t q_size = shape.heads * d, kv_size = shape.kv_heads * d;
  const bool norm = q_norm.defined();
  Heads heads;
  heads.v = qkv.narrow(1, q_size + kv_size, kv_size).view({rows, shape.kv_heads, d});
  if (norm) {
    heads.q = at::empty({rows, shape.heads, d}, qkv.options());
    heads.k = at::empty({rows, shape.kv_heads, d}, qkv.options());
    heads.rstd_q = at::empty({rows, shape.heads}, device.float_options());
    heads.rstd_k = at::empty({rows, shape.kv_heads}, device.float_options());
  } else {
    heads.q = qkv.narrow(1, 0, q_size).view({rows, shape.heads, d});
    heads.k = qkv.narrow(1, q_size, kv_size).view({rows, shape.kv_heads, d});
  }
  const HtNormRope of_q = kernel_arguments(rope, q_norm, eps, shape.heads, d);
  const HtNormRope of_k = kernel_arguments(rope, k_norm, eps, shape.kv_heads, d);
  const void* in = qkv.const_data_ptr();
  const void* in_k = advance(in, q_size, qkv);
  void* q = heads.q.data_ptr();
  void* k = heads.k.data_ptr();
  float* rq = norm ? heads.rstd_q.data_ptr<float>() : nullptr;
  float* rk = norm ? heads.rstd_k.data_ptr<float>() : nullptr;
  launch_rows(kernels, rows, width, [&](std::int64_t begin, std::int64_t end) {
    kernels.norm_rope_forward(device.stream(), &of_q, in, width, q, norm ? q_size : width, rq, begin, end);
    kernels.norm_rope_forward(device.stream(), &of_k, in_k, width, k, norm ? kv_size : width, rk, begin, end);
  });
  return heads;
}

void norm_rope_backward(const Device& device, at::Tensor& dqkv, const at::Tensor& qkv, const Heads& heads,
                        const HeadShape& shape, const RopeTable& rope, const at::Tensor& q_norm,
                        const at::Tensor& k_norm) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = dqkv.size(0), width = dqkv.size(1), d = shape.head_dim;
  const std::int64_t q_size = shape.heads * d;
  const bool norm = q_norm.defined();
  const HtNormRope of_q = kernel_arguments(rope, q_norm, 0, shape.heads, d);
  const HtNormRope of_k = kernel_arguments(rope, k_norm, 0, shape.kv_heads, d);
  void* dq = dqkv.data_ptr();
  void* dk = advance(dq, q_size, dqkv);
  const void* in = qkv.const_data_ptr();
  const void* in_k = advance(in, q_size, qkv);
  const float* rq = norm ? heads.rstd_q.const_data_ptr<float>() : nullptr;
  const float* rk = norm ? heads.rstd_k.const_data_ptr<float>() : nullptr;
  launch_rows(kernels, rows, width, [&](std::int64_t begin, std::int64_t end) {
    kernels.norm_rope_backward(device.stream(), &of_q, dq, width, in, width, rq, begin, end);
    kernels.norm_rope_backward(device.stream(), &of_k, dk, width, in_k, width, rk, begin, end);
  });
}

at::Tensor norm_rope_reference(const at::Tensor& qkv, const HeadShape& shape, const RopeTable& rope,
                               const at::Tensor& q_norm, const at::Tensor& k_norm, double eps) {
  const std::int64_t rows = qkv.size(0), d = shape.head_dim, kv_size = shape.kv_heads * d;
  const auto both_halves = [&](const at::Tensor& x) { return at::cat({x, x}, -1).unsqueeze(1).to(qkv.dtype()); };
  const auto rotated = [&](const at::Tensor& x, std::int64_t heads, const at::Tensor& norm) {
    at::Tensor h = x.view({rows, heads, d});
    if (norm.defined()) h = rms_norm_reference(h, norm, eps);
    const auto halves = h.chunk(2, -1);
    return (h * both_halves(rope.cos) + at::cat({-halves[1], halves[0]}, -1) * both_halves(rope.sin)).flatten(1);
  };
  const auto parts = qkv.split_with_sizes({shape.heads * d, kv_size, kv_size}, 1);
  return at::cat({rotated(parts[0].contiguous(), shape.heads, q_norm),
                  rotated(parts[1].contiguous(), shape.kv_heads, k_norm), parts[2]},
                 1);
}

}  // namespace ht::engine
