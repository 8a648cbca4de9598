#include "worker_protocol/losses.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace ht::worker_protocol {
namespace {

struct ConfigKey {
  std::string_view name;
  double LossConfig::*field;
};
constexpr ConfigKey kConfigKeys[] = {
    {"clip_low_threshold", &LossConfig::clip_low_threshold},
    {"clip_high_threshold", &LossConfig::clip_high_threshold},
    {"beta", &LossConfig::beta},
    {"ratio_max", &LossConfig::ratio_max},
};

}  // namespace

const std::vector<LossSpec>& loss_specs() {
  static const std::vector<LossSpec> specs = {
      {.kind = LossKind::cross_entropy,
       .name = "cross_entropy",
       .optional_inputs = {"weights"},
       .allows_2d_targets = true,
       .requires_spans = false},
      {.kind = LossKind::importance_sampling,
       .name = "importance_sampling",
       .required_inputs = {"logprobs", "advantages"},
       .allows_2d_targets = false,
       .requires_spans = false},
      {.kind = LossKind::ppo,
       .name = "ppo",
       .required_inputs = {"logprobs", "advantages"},
       .optional_inputs = {"clip_low_threshold", "clip_high_threshold"},
       .config_keys = {"clip_low_threshold", "clip_high_threshold"},
       .defaults = {.clip_low_threshold = 0.8, .clip_high_threshold = 1.2},
       .allows_2d_targets = false,
       .requires_spans = false},
      {.kind = LossKind::cispo,
       .name = "cispo",
       .required_inputs = {"logprobs", "advantages"},
       .optional_inputs = {"clip_low_threshold", "clip_high_threshold"},
       .config_keys = {"clip_low_threshold", "clip_high_threshold"},
       .defaults = {.clip_low_threshold = 0.0, .clip_high_threshold = 4.0},
       .allows_2d_targets = false,
       .requires_spans = false},
      {.kind = LossKind::dro,
       .name = "dro",
       .required_inputs = {"logprobs", "advantages"},
       .config_keys = {"beta"},
       .defaults = {.beta = 0.05},
       .allows_2d_targets = false,
       .requires_spans = false},
      {.kind = LossKind::gspo,
       .name = "gspo",
       .required_inputs = {"logprobs", "advantages", "sequence_ratio_mask"},
       .optional_inputs = {"clip_low_threshold", "clip_high_threshold"},
       .config_keys = {"clip_low_threshold", "clip_high_threshold"},
       .defaults = {.clip_low_threshold = 0.8, .clip_high_threshold = 1.2},
       .allows_2d_targets = false,
       .requires_spans = false},
      {.kind = LossKind::stable_reinforce,
       .name = "stable_reinforce",
       .required_inputs = {"logprobs", "advantages"},
       .config_keys = {"ratio_max"},
       .defaults = {.ratio_max = 2.0},
       .allows_2d_targets = false,
       .requires_spans = true},
  };
  return specs;
}

const LossSpec* find_loss(std::string_view name) {
  for (const LossSpec& spec : loss_specs()) {
    if (spec.name == name) return &spec;
  }
  return nullptr;
}

const LossSpec& loss_spec(LossKind kind) {
  for (const LossSpec& spec : loss_specs()) {
    if (spec.kind == kind) return spec;
  }
  throw server_error("there is no loss number " + std::to_string(static_cast<int>(kind)));
}

void set_loss_config(const LossSpec& spec, LossConfig& config, std::string_view key, double value) {
  if (std::find(spec.config_keys.begin(), spec.config_keys.end(), key) == spec.config_keys.end()) {
    std::string allowed;
    for (const std::string_view name : spec.config_keys) allowed += (allowed.empty() ? "" : ", ") + std::string(name);
    throw user_error("loss_fn_config key \"" + std::string(key) + "\" is unknown to loss " + std::string(spec.name) +
                     (allowed.empty() ? ", which has none" : "; allowed: " + allowed));
  }
  if (!std::isfinite(value)) {
    throw user_error("loss_fn_config key \"" + std::string(key) + "\" must be a finite number, it is " +
                     std::to_string(value));
  }
  for (const ConfigKey& row : kConfigKeys) {
    if (row.name == key) config.*row.field = value;
  }
}

}  // namespace ht::worker_protocol
