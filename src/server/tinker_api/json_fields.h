#pragma once

// Typed fields of a JSON object from a client, as lax as the SDK's server: null is absent (but for number()), 3.0 is an
// integer, integers are numbers. All throw Error(user) naming the field, its value and what is wanted.

#include <boost/json.hpp>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ht::tinker_api {

namespace json = boost::json;

class Fields {
 public:
  // `where` prefixes the names in messages: "sampling_params.".
  explicit Fields(const json::object& object, std::string where = {}) : object_(&object), where_(std::move(where)) {}

  // nullptr when absent or null.
  const json::value* find(std::string_view key) const;
  const json::value& get(std::string_view key) const;

  std::string text(std::string_view key) const;
  std::optional<std::string> optional_text(std::string_view key) const;
  std::int64_t integer(std::string_view key) const;
  std::optional<std::int64_t> optional_integer(std::string_view key) const;
  // Within [low, high], `absent` when it is not there.
  std::int64_t bounded(std::string_view key, std::int64_t absent, std::int64_t low, std::int64_t high) const;
  // Finite; null is an error here: it stands for NaN or infinity.
  double number(std::string_view key, double absent) const;
  bool boolean(std::string_view key, bool absent) const;
  // An object; an empty one when absent.
  Fields object(std::string_view key) const;
  const json::object* optional_object(std::string_view key) const;
  std::map<std::string, std::string> text_map(std::string_view key) const;
  std::vector<std::string> text_list(std::string_view key) const;

  std::string name_of(std::string_view key) const { return where_ + std::string(key); }

 private:
  const json::object* object_;
  std::string where_;
};

// Integers of a JSON array, each within [low, high]; `name` is for errors.
std::vector<std::int64_t> integers(const json::value& value, const std::string& name, std::int64_t low,
                                   std::int64_t high);

// Appends the same to `out`.
void append_int32(const json::value& value, const std::string& name, std::int64_t low, std::int64_t high,
                  std::vector<std::int32_t>& out);

// The body as an object. Throws Error(user) saying where the text stops being JSON.
json::object parse_object(std::string_view body);

// `value` for an error message: at most 80 characters.
std::string shown(const json::value& value);

}  // namespace ht::tinker_api
