#include "model_spec/config_fields.h"

#include <cmath>

#include "base/error.h"

namespace ht::model_spec {

namespace json = boost::json;

const json::value* ConfigFields::find(std::string_view key) const {
  const json::value* value = object_->if_contains(key);
  return value == nullptr || value->is_null() ? nullptr : value;
}

void ConfigFields::refuse(std::string_view key, const std::string& what) const {
  const json::value* value = object_->if_contains(key);
  throw user_error(where_ + ": " + std::string(key) + " is " + (value == nullptr ? "absent" : json::serialize(*value)) +
                   ", " + what);
}

void ConfigFields::missing(std::string_view key) const {
  throw user_error(where_ + " has no " + std::string(key));
}

std::int64_t ConfigFields::integer(std::string_view key, std::int64_t fallback, std::int64_t least,
                                   std::int64_t most) const {
  const json::value* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_int64() || value->get_int64() < least || value->get_int64() > most) {
    refuse(key, "it must be an integer from " + std::to_string(least) + " to " + std::to_string(most));
  }
  return value->get_int64();
}

std::optional<double> ConfigFields::optional_number(std::string_view key) const {
  const json::value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number() || !std::isfinite(value->to_number<double>())) refuse(key, "it must be a finite number");
  return value->to_number<double>();
}

double ConfigFields::number(std::string_view key, double fallback) const {
  return optional_number(key).value_or(fallback);
}

bool ConfigFields::boolean(std::string_view key, bool fallback) const {
  const json::value* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_bool()) refuse(key, "it must be true or false");
  return value->get_bool();
}

std::string ConfigFields::text(std::string_view key, std::string_view fallback) const {
  const json::value* value = find(key);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) refuse(key, "it must be a string");
  return std::string(value->get_string());
}

std::vector<double> ConfigFields::numbers(std::string_view key) const {
  const json::value* value = find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) refuse(key, "it must be an array of numbers");
  std::vector<double> result;
  for (const json::value& item : value->get_array()) {
    if (!item.is_number()) refuse(key, "it must be an array of numbers");
    result.push_back(item.to_number<double>());
  }
  return result;
}

std::vector<std::string> ConfigFields::texts(std::string_view key) const {
  const json::value* value = find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) refuse(key, "it must be an array of strings");
  std::vector<std::string> result;
  for (const json::value& item : value->get_array()) {
    if (!item.is_string()) refuse(key, "it must be an array of strings");
    result.emplace_back(item.get_string());
  }
  return result;
}

}  // namespace ht::model_spec
