#include "server/tinker_api/loss_config.h"

#include <charconv>
#include <cmath>

#include "base/error.h"

namespace ht::tinker_api {
namespace {

double number_of(const std::string& key, const tinker_public::LossConfigValue& value) {
  if (value.value_case() == tinker_public::LossConfigValue::kNumber) return value.number();
  double number = 0;
  const std::string& text = value.text();
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) {
    throw user_error("loss_fn_config \"" + key + "\" = \"" + text + "\" is no number");
  }
  return number;
}

void set(const worker_protocol::LossSpec& spec, worker_protocol::LossConfig& config, const std::string& key,
         double value) {
  if (!std::isfinite(value)) {
    throw user_error("NonFiniteInTensor: loss_fn_config \"" + key + "\" = " + std::to_string(value) +
                     " must be finite");
  }
  worker_protocol::set_loss_config(spec, config, key, value);
  if (value < 0) {
    throw user_error("loss_fn_config \"" + key + "\" = " + std::to_string(value) + " must not be negative");
  }
}

}  // namespace

const worker_protocol::LossSpec& requested_loss(const tinker_public::ForwardBackwardRequest& request) {
  if (const worker_protocol::LossSpec* spec = worker_protocol::find_loss(request.loss_fn())) return *spec;
  std::string known;
  for (const worker_protocol::LossSpec& spec : worker_protocol::loss_specs()) {
    known += (known.empty() ? "" : ", ") + std::string(spec.name);
  }
  throw user_error("loss_fn \"" + request.loss_fn() + "\" is unknown; allowed: " + known);
}

worker_protocol::LossConfig requested_loss_config(const tinker_public::ForwardBackwardRequest& request,
                                                  const worker_protocol::LossSpec& spec) {
  worker_protocol::LossConfig config = spec.defaults;
  if (!request.loss_fn_config_v2().empty()) {
    for (const auto& [key, value] : request.loss_fn_config_v2()) set(spec, config, key, number_of(key, value));
  } else {
    for (const auto& [key, value] : request.loss_fn_config()) set(spec, config, key, value);
  }
  if (config.clip_low_threshold > config.clip_high_threshold) {
    throw user_error("loss_fn_config clip_low_threshold = " + std::to_string(config.clip_low_threshold) +
                     " is above clip_high_threshold = " + std::to_string(config.clip_high_threshold));
  }
  return config;
}

}  // namespace ht::tinker_api
