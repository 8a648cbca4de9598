#pragma once

#include <cstdint>
#include <span>

#include "worker_protocol/losses.h"

namespace ht::engine {

// The inputs of a loss over consecutive targets; an empty span means "not given". lp is the current logprob of a
// target, q the sampling policy's, A the advantage, ratio = exp(lp - q).
struct LossInputs {
  std::span<const float> logprobs;      // lp
  std::span<const float> weights;       // cross_entropy; not given: 1
  std::span<const float> old_logprobs;  // q
  std::span<const float> advantages;    // A
  std::span<const float> sequence_ratio_mask;
  std::span<const float> clip_low;  // per target, instead of the config's
  std::span<const float> clip_high;
};

// Sum of the loss over the targets; writes d(loss)/d(lp) into `dlogprobs` (same length). gspo takes exactly one datum's
// targets, the others any range. A target with weight (or advantage) 0 contributes exactly 0 whatever its logprob.
//   cross_entropy        -w lp
//   importance_sampling  -ratio A
//   ppo                  -min(ratio A, clip(ratio, lo, hi) A)
//   cispo                -sg(clip(ratio, lo, hi)) A lp
//   dro                  -(A lp - beta/2 (lp - q)²)
//   gspo                 -min(s A, clip(s, lo, hi) A) with s = exp(mean over the mask of (lp - q)); a token's ratio has
//                        the value s and the gradient of its own lp
//   stable_reinforce     -sg(min(ratio, ratio_max)) A lp
double token_loss(worker_protocol::LossKind kind, const worker_protocol::LossConfig& config, const LossInputs& inputs,
                  std::span<float> dlogprobs);

}  // namespace ht::engine
