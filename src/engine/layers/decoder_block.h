#pragma once

#include <ATen/core/Tensor.h>

#include "engine/layers/mlp.h"
#include "engine/layers/recompute.h"
#include "engine/layers/self_attention.h"

namespace ht::engine {

// transformers' LlamaDecoderLayer: h += attention(norm(h)); h += mlp(norm(h)).
struct DecoderBlock {
  at::Tensor attention_norm;  // (hidden): input_layernorm
  SelfAttention attention;
  at::Tensor mlp_norm;  // (hidden): post_attention_layernorm
  Mlp mlp;
  double norm_eps = 0;

  struct Saved {
    at::Tensor input;   // (T, hidden)
    at::Tensor middle;  // (T, hidden), after the attention
    at::Tensor attention_rstd, mlp_rstd;
    at::Tensor attention_input, mlp_input;  // the norms' outputs
    SelfAttention::Saved attention;
    Mlp::Saved mlp;
  };

  // h (T, hidden) -> (T, hidden). `saved` nullptr: inference.
  at::Tensor forward(const at::Tensor& h, const BlockContext& context, Saved* saved, Recompute recompute) const;
  // In: dh is the gradient of the output; out: of the input. Consumes `saved`. With need_dx false (the first block: the
  // embedding is frozen) dh is left unspecified.
  void backward(at::Tensor& dh, const BlockContext& context, Saved& saved, Recompute recompute, bool need_dx) const;
};

}  // namespace ht::engine
