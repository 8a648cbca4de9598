#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ht::worker_protocol {

enum class LossKind : int {
  cross_entropy = 1,
  importance_sampling = 2,
  ppo = 3,
  cispo = 4,
  dro = 5,
  gspo = 6,
  stable_reinforce = 7,
};

// Resolved configuration of a loss: the request's keys over the loss's defaults.
struct LossConfig {
  double clip_low_threshold = 0.0;   // ppo, cispo, gspo: absolute lower bound of the ratio
  double clip_high_threshold = 0.0;  // ppo, cispo, gspo: absolute upper bound of the ratio
  double beta = 0.0;                 // dro
  double ratio_max = 0.0;            // stable_reinforce: upper bound of the truncated ratio

  friend bool operator==(const LossConfig&, const LossConfig&) = default;
};

// What a loss takes, for validation and for error messages.
struct LossSpec {
  LossKind kind;
  std::string_view name;                          // the SDK's spelling
  std::vector<std::string_view> required_inputs;  // beside target_tokens, each of target_tokens' shape
  std::vector<std::string_view> optional_inputs;  // ditto
  std::vector<std::string_view> config_keys;      // allowed keys of loss_fn_config
  LossConfig defaults;
  bool allows_2d_targets;  // (N, K) targets
  bool requires_spans;     // provenance spans on every datum
};

// All losses, in LossKind order.
const std::vector<LossSpec>& loss_specs();
// nullptr for an unknown name.
const LossSpec* find_loss(std::string_view name);
const LossSpec& loss_spec(LossKind kind);
// Sets the key's field. The key must be one of spec.config_keys (throws Error(user) otherwise, naming those allowed).
void set_loss_config(const LossSpec& spec, LossConfig& config, std::string_view key, double value);

}  // namespace ht::worker_protocol
