#include "server/tinker_api/json_fields.h"

#include <cmath>

#include "base/error.h"

namespace ht::tinker_api {
namespace {

std::optional<std::int64_t> as_integer(const json::value& value) {
  if (value.is_int64()) return value.get_int64();
  // 2^63 is the first double beyond the range.
  if (value.is_double() && value.get_double() == std::floor(value.get_double()) && value.get_double() >= -0x1p63 &&
      value.get_double() < 0x1p63) {
    return static_cast<std::int64_t>(value.get_double());
  }
  return std::nullopt;
}

std::string range(std::int64_t low, std::int64_t high) {
  return "[" + std::to_string(low) + ", " + std::to_string(high) + "]";
}

}  // namespace

std::string shown(const json::value& value) {
  if (value.is_array()) return "an array of " + std::to_string(value.get_array().size());
  if (value.is_object()) return "an object";
  std::string text = json::serialize(value);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

json::object parse_object(std::string_view body) {
  json::error_code error;
  json::stream_parser parser;
  const std::size_t parsed = parser.write_some(body.data(), body.size(), error);
  if (!error && parsed == body.size()) parser.finish(error);
  if (error || parsed != body.size()) {
    throw user_error("the body is no JSON: " + (error ? error.message() : "text follows its end") + " near byte " +
                     std::to_string(parsed) + " of " + std::to_string(body.size()));
  }
  json::value value = parser.release();
  if (!value.is_object()) throw user_error("the body must be a JSON object, got " + shown(value));
  return std::move(value.get_object());
}

const json::value* Fields::find(std::string_view key) const {
  const json::value* value = object_->if_contains(key);
  return value && !value->is_null() ? value : nullptr;
}

const json::value& Fields::get(std::string_view key) const {
  if (const json::value* value = find(key)) return *value;
  throw user_error("field \"" + name_of(key) + "\" is required");
}

std::optional<std::string> Fields::optional_text(std::string_view key) const {
  const json::value* value = find(key);
  if (!value) return std::nullopt;
  if (!value->is_string()) throw user_error("field \"" + name_of(key) + "\" must be a string, got " + shown(*value));
  return std::string(value->get_string());
}

std::string Fields::text(std::string_view key) const {
  get(key);
  return *optional_text(key);
}

std::optional<std::int64_t> Fields::optional_integer(std::string_view key) const {
  const json::value* value = find(key);
  if (!value) return std::nullopt;
  const std::optional<std::int64_t> integer = as_integer(*value);
  if (!integer) throw user_error("field \"" + name_of(key) + "\" must be an integer, got " + shown(*value));
  return integer;
}

std::int64_t Fields::integer(std::string_view key) const {
  get(key);
  return *optional_integer(key);
}

std::int64_t Fields::bounded(std::string_view key, std::int64_t absent, std::int64_t low, std::int64_t high) const {
  const std::optional<std::int64_t> value = optional_integer(key);
  if (!value) return absent;
  if (*value < low || *value > high) {
    throw user_error(name_of(key) + " = " + std::to_string(*value) + " is outside " + range(low, high));
  }
  return *value;
}

double Fields::number(std::string_view key, double absent) const {
  const json::value* value = object_->if_contains(key);
  if (!value) return absent;
  // The SDK leaves out what is not set, and writes an infinity or NaN as null.
  if (value->is_null()) throw user_error(name_of(key) + " = null (NaN or infinity) must be a finite number");
  json::error_code error;
  const double number = value->is_number() ? value->to_number<double>(error) : std::nan("");
  if (error || !std::isfinite(number)) {
    throw user_error("field \"" + name_of(key) + "\" must be a finite number, got " + shown(*value));
  }
  return number;
}

bool Fields::boolean(std::string_view key, bool absent) const {
  const json::value* value = find(key);
  if (!value) return absent;
  if (!value->is_bool()) throw user_error("field \"" + name_of(key) + "\" must be true or false, got " + shown(*value));
  return value->get_bool();
}

const json::object* Fields::optional_object(std::string_view key) const {
  const json::value* value = find(key);
  if (!value) return nullptr;
  if (!value->is_object()) throw user_error("field \"" + name_of(key) + "\" must be an object, got " + shown(*value));
  return &value->get_object();
}

Fields Fields::object(std::string_view key) const {
  static const json::object empty;
  const json::object* found = optional_object(key);
  return Fields(found ? *found : empty, name_of(key) + ".");
}

std::map<std::string, std::string> Fields::text_map(std::string_view key) const {
  std::map<std::string, std::string> out;
  const json::object* found = optional_object(key);
  if (!found) return out;
  for (const auto& [name, value] : *found) {
    if (!value.is_string()) {
      throw user_error("field \"" + name_of(key) + "\" maps strings to strings, got " + shown(value) + " for \"" +
                       std::string(name) + "\"");
    }
    out.emplace(name, value.get_string());
  }
  return out;
}

std::vector<std::string> Fields::text_list(std::string_view key) const {
  std::vector<std::string> out;
  const json::value* found = find(key);
  if (!found) return out;
  if (!found->is_array()) throw user_error("field \"" + name_of(key) + "\" must be a list, got " + shown(*found));
  for (const json::value& value : found->get_array()) {
    if (!value.is_string()) throw user_error("field \"" + name_of(key) + "\" must hold strings, got " + shown(value));
    out.emplace_back(value.get_string());
  }
  return out;
}

namespace {

template <typename T>
void append(const json::value& value, const std::string& name, std::int64_t low, std::int64_t high,
            std::vector<T>& out) {
  if (!value.is_array()) throw user_error(name + " must be a list of integers, got " + shown(value));
  const json::array& array = value.get_array();
  out.reserve(out.size() + array.size());
  for (std::size_t i = 0; i < array.size(); ++i) {
    const std::optional<std::int64_t> integer = as_integer(array[i]);
    if (!integer || *integer < low || *integer > high) {
      throw user_error(name + "[" + std::to_string(i) + "] = " + shown(array[i]) + "; allowed: integers in " +
                       range(low, high));
    }
    out.push_back(static_cast<T>(*integer));
  }
}

}  // namespace

std::vector<std::int64_t> integers(const json::value& value, const std::string& name, std::int64_t low,
                                   std::int64_t high) {
  std::vector<std::int64_t> out;
  append(value, name, low, high, out);
  return out;
}

void append_int32(const json::value& value, const std::string& name, std::int64_t low, std::int64_t high,
                  std::vector<std::int32_t>& out) {
  append(value, name, low, high, out);
}

}  // namespace ht::tinker_api
