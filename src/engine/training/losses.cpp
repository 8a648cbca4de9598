#include "engine/training/losses.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/error.h"

namespace ht::engine {

using worker_protocol::LossConfig;
using worker_protocol::LossKind;

namespace {

struct Term {
  double loss = 0;
  double derivative = 0;  // with respect to lp
};

Term policy_term(LossKind kind, const LossConfig& config, double lp, double q, double advantage, double ratio,
                 double low, double high) {
  switch (kind) {
    case LossKind::importance_sampling:
      return {-ratio * advantage, -ratio * advantage};
    case LossKind::ppo:
    case LossKind::gspo: {
      const double unclipped = ratio * advantage;
      const double clipped = std::clamp(ratio, low, high) * advantage;
      return unclipped <= clipped ? Term{-unclipped, -unclipped} : Term{-clipped, 0.0};
    }
    case LossKind::cispo: {
      const double factor = std::clamp(ratio, low, high) * advantage;
      return {-factor * lp, -factor};
    }
    case LossKind::dro: {
      const double difference = lp - q;
      return {-(lp * advantage - 0.5 * config.beta * difference * difference), -(advantage - config.beta * difference)};
    }
    case LossKind::stable_reinforce: {
      const double factor = std::min(ratio, config.ratio_max) * advantage;
      return {-factor * lp, -factor};
    }
    case LossKind::cross_entropy:
      break;
  }
  throw server_error("loss " + std::to_string(static_cast<int>(kind)) + " is no policy loss");
}

// exp(mean over the mask of (lp - q)); no mask: over all; an all-zero mask: 1.
double sequence_ratio(const LossInputs& inputs) {
  double sum = 0, count = 0;
  for (std::size_t i = 0; i < inputs.logprobs.size(); ++i) {
    if (!inputs.sequence_ratio_mask.empty() && inputs.sequence_ratio_mask[i] == 0.0f) continue;
    sum += static_cast<double>(inputs.logprobs[i]) - inputs.old_logprobs[i];
    count += 1;
  }
  return count == 0 ? 1.0 : std::exp(sum / count);
}

}  // namespace

double token_loss(LossKind kind, const LossConfig& config, const LossInputs& inputs, std::span<float> dlogprobs) {
  double total = 0;
  if (kind == LossKind::cross_entropy) {
    for (std::size_t i = 0; i < inputs.logprobs.size(); ++i) {
      const float weight = inputs.weights.empty() ? 1.0f : inputs.weights[i];
      dlogprobs[i] = -weight;
      if (weight == 0.0f) {
        dlogprobs[i] = 0.0f;
        continue;
      }
      total -= static_cast<double>(weight) * inputs.logprobs[i];
    }
    return total;
  }
  const double s = kind == LossKind::gspo ? sequence_ratio(inputs) : 0.0;
  for (std::size_t i = 0; i < inputs.logprobs.size(); ++i) {
    const double advantage = inputs.advantages[i];
    // dro pulls towards the sampling policy at zero advantage too, the others vanish there.
    if (advantage == 0.0 && kind != LossKind::dro) {
      dlogprobs[i] = 0.0f;
      continue;
    }
    const double lp = inputs.logprobs[i], q = inputs.old_logprobs[i];
    const double ratio = kind == LossKind::gspo ? s : std::exp(lp - q);
    const double low = inputs.clip_low.empty() ? config.clip_low_threshold : inputs.clip_low[i];
    const double high = inputs.clip_high.empty() ? config.clip_high_threshold : inputs.clip_high[i];
    const Term term = policy_term(kind, config, lp, q, advantage, ratio, low, high);
    total += term.loss;
    dlogprobs[i] = static_cast<float>(term.derivative);
  }
  return total;
}

}  // namespace ht::engine
