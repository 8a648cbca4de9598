#include "model_spec/rope_config.h"

#include <climits>

namespace ht::model_spec {
namespace {

namespace json = boost::json;

// An empty object counts as absent, as in Python's `rope_scaling or rope_parameters`.
const json::object* scaling_object(const ConfigFields& config, std::string_view key) {
  const json::value* value = config.find(key);
  if (value == nullptr) return nullptr;
  if (!value->is_object()) config.refuse(key, "it must be an object");
  return value->get_object().empty() ? nullptr : &value->get_object();
}

RopeType parse_type(const ConfigFields& scaling) {
  const std::string_view key = scaling.has("rope_type") ? "rope_type" : "type";
  const std::string name = scaling.text(key, "default");
  if (name == "default") return RopeType::standard;
  if (name == "linear") return RopeType::linear;
  if (name == "dynamic") return RopeType::dynamic;
  if (name == "yarn") return RopeType::yarn;
  if (name == "llama3") return RopeType::llama3;
  if (name == "longrope") return RopeType::longrope;
  scaling.refuse(key, "supported are default, linear, dynamic, yarn, llama3, longrope");
}

void refuse_partial(const ConfigFields& fields) {
  if (fields.number("partial_rotary_factor", 1.0) != 1.0) {
    fields.refuse("partial_rotary_factor", "only whole heads can be rotated (1.0)");
  }
}

double required_number(const ConfigFields& scaling, std::string_view key) {
  const auto value = scaling.optional_number(key);
  if (!value) scaling.missing(key);
  return *value;
}

double positive(const ConfigFields& scaling, std::string_view key, double value) {
  if (!(value > 0.0)) scaling.refuse(key, "it must be above 0");
  return value;
}

std::vector<double> per_frequency(const ConfigFields& scaling, std::string_view key, int head_dim) {
  std::vector<double> factors = scaling.numbers(key);
  if (factors.size() != static_cast<std::size_t>(head_dim / 2)) {
    scaling.refuse(key, "it must have head_dim / 2 = " + std::to_string(head_dim / 2) + " numbers");
  }
  for (const double factor : factors) {
    if (!(factor > 0.0)) scaling.refuse(key, "its numbers must be above 0");
  }
  return factors;
}

}  // namespace

RopeSpec read_rope(const ConfigFields& config, int head_dim, int max_position_embeddings) {
  RopeSpec rope;
  rope.theta = positive(config, "rope_theta", config.number("rope_theta", 10000.0));
  refuse_partial(config);

  const bool older = scaling_object(config, "rope_scaling") != nullptr;
  const json::object* object = scaling_object(config, older ? "rope_scaling" : "rope_parameters");
  if (object == nullptr) return rope;
  const ConfigFields scaling(*object, config.where() + ": " + (older ? "rope_scaling" : "rope_parameters"));
  for (const std::string_view layer_type : {"full_attention", "sliding_attention"}) {
    if (scaling.has(layer_type)) scaling.refuse(layer_type, "a rotary embedding per layer type is not supported");
  }
  rope.type = parse_type(scaling);
  rope.theta = positive(scaling, "rope_theta", scaling.number("rope_theta", rope.theta));
  refuse_partial(scaling);
  if (rope.type == RopeType::standard) return rope;

  // Phi-3 wrote the pre-training length beside the scaling; transformers lets that one win.
  const ConfigFields& length_owner = config.find("original_max_position_embeddings") != nullptr ? config : scaling;
  rope.original_max_position_embeddings =
      static_cast<int>(length_owner.integer("original_max_position_embeddings", max_position_embeddings, 1, INT_MAX));

  const bool may_lack_factor = rope.type == RopeType::yarn || rope.type == RopeType::longrope;
  rope.factor = may_lack_factor && scaling.find("factor") == nullptr
                    ? static_cast<double>(max_position_embeddings) / rope.original_max_position_embeddings
                    : positive(scaling, "factor", required_number(scaling, "factor"));

  switch (rope.type) {
    case RopeType::llama3:
      rope.low_freq_factor = positive(scaling, "low_freq_factor", required_number(scaling, "low_freq_factor"));
      rope.high_freq_factor = positive(scaling, "high_freq_factor", required_number(scaling, "high_freq_factor"));
      if (rope.high_freq_factor <= rope.low_freq_factor) {
        scaling.refuse("high_freq_factor", "it must be above low_freq_factor");
      }
      break;
    case RopeType::yarn:
      // transformers writes `rope_parameters.get("beta_fast") or 32`: 0 is the default too.
      if (const double beta = scaling.number("beta_fast", 0.0); beta != 0.0)
        rope.beta_fast = positive(scaling, "beta_fast", beta);
      if (const double beta = scaling.number("beta_slow", 0.0); beta != 0.0)
        rope.beta_slow = positive(scaling, "beta_slow", beta);
      rope.attention_factor = scaling.optional_number("attention_factor");
      rope.mscale = scaling.optional_number("mscale");
      rope.mscale_all_dim = scaling.optional_number("mscale_all_dim");
      rope.truncate = scaling.boolean("truncate", true);
      break;
    case RopeType::longrope:
      rope.attention_factor = scaling.optional_number("attention_factor");
      rope.short_factor = per_frequency(scaling, "short_factor", head_dim);
      rope.long_factor = per_frequency(scaling, "long_factor", head_dim);
      break;
    case RopeType::dynamic:
      if (head_dim <= 2) config.refuse("head_dim", "dynamic rope needs more than 2");
      break;
    case RopeType::standard:
    case RopeType::linear:
      break;
  }
  return rope;
}

}  // namespace ht::model_spec
