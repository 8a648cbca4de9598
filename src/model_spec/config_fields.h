#pragma once

// Checked access to the fields of a config.json; used inside model_spec only.

#include <boost/json.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ht::model_spec {

// One JSON object and where it came from ("/models/x/config.json", "… rope_scaling"). An absent field has its default;
// null counts as absent unless a function says otherwise. A wrong type or range throws Error(user) naming the field.
class ConfigFields {
 public:
  ConfigFields(const boost::json::object& object, std::string where) : object_(&object), where_(std::move(where)) {}

  bool has(std::string_view key) const { return object_->contains(key); }
  const boost::json::value* find(std::string_view key) const;  // nullptr: absent or null

  std::int64_t integer(std::string_view key, std::int64_t fallback, std::int64_t least, std::int64_t most) const;
  double number(std::string_view key, double fallback) const;
  std::optional<double> optional_number(std::string_view key) const;
  bool boolean(std::string_view key, bool fallback) const;
  std::string text(std::string_view key, std::string_view fallback) const;
  std::vector<double> numbers(std::string_view key) const;
  std::vector<std::string> texts(std::string_view key) const;

  // "<where>: <key> is <value>, <what>"
  [[noreturn]] void refuse(std::string_view key, const std::string& what) const;
  [[noreturn]] void missing(std::string_view key) const;
  const std::string& where() const { return where_; }

 private:
  const boost::json::object* object_;
  std::string where_;
};

}  // namespace ht::model_spec
