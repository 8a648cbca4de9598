#include "engine/layers/decoder_block.h"

#include <ATen/ATen.h>

#include "engine/ops/rms_norm.h"

namespace ht::engine {

at::Tensor DecoderBlock::forward(const at::Tensor& h, const BlockContext& context, Saved* saved,
                                 Recompute recompute) const {
  if (saved == nullptr || recompute == Recompute::block) {
    if (saved != nullptr) saved->input = h;
    at::Tensor rstd;
    const at::Tensor middle =
        attention.forward(rms_norm_forward(context.device, h, attention_norm, norm_eps, rstd), h, context, nullptr);
    return mlp.forward(rms_norm_forward(context.device, middle, mlp_norm, norm_eps, rstd), middle, context, nullptr);
  }
  saved->input = h;
  const at::Tensor attention_input =
      rms_norm_forward(context.device, h, attention_norm, norm_eps, saved->attention_rstd);
  saved->middle = attention.forward(attention_input, h, context, &saved->attention);
  const at::Tensor mlp_input = rms_norm_forward(context.device, saved->middle, mlp_norm, norm_eps, saved->mlp_rstd);
  at::Tensor out = mlp.forward(mlp_input, saved->middle, context, &saved->mlp);
  if (recompute == Recompute::norms_mlp) {
    saved->mlp.gate_up.reset();
    saved->mlp.act.reset();
  } else {
    saved->attention_input = attention_input;
    saved->mlp_input = mlp_input;
  }
  return out;
}

void DecoderBlock::backward(at::Tensor& dh, const BlockContext& context, Saved& saved, Recompute recompute,
                            bool need_dx) const {
  if (recompute == Recompute::block) {
    // All of the forward but the last projection.
    saved.attention_input =
        rms_norm_forward(context.device, saved.input, attention_norm, norm_eps, saved.attention_rstd);
    saved.middle = attention.forward(saved.attention_input, saved.input, context, &saved.attention);
    saved.mlp_input = rms_norm_forward(context.device, saved.middle, mlp_norm, norm_eps, saved.mlp_rstd);
    mlp.recompute(saved.mlp_input, context, saved.mlp);
  } else if (recompute == Recompute::norms_mlp) {
    saved.mlp_input = rms_norm_apply(context.device, saved.middle, mlp_norm, saved.mlp_rstd);
    mlp.recompute(saved.mlp_input, context, saved.mlp);
    saved.attention_input = rms_norm_apply(context.device, saved.input, attention_norm, saved.attention_rstd);
  }
  const at::Tensor d_mlp_input = mlp.backward(dh, saved.mlp_input, context, saved.mlp);
  rms_norm_backward(context.device, d_mlp_input, saved.middle, mlp_norm, saved.mlp_rstd, dh);
  const at::Tensor d_attention_input = attention.backward(dh, saved.attention_input, context, saved.attention, need_dx);
  if (need_dx)
    rms_norm_backward(context.device, d_attention_input, saved.input, attention_norm, saved.attention_rstd, dh);
  saved = Saved{};
}

}  // namespace ht::engine
