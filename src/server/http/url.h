#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace ht::http {

// Percent-decodes `text`; '+' stays. Throws Error(user) for a '%' without two hexadecimal digits.
std::string percent_decode(std::string_view text);

// A request target cut up: "http://host" of the absolute form is dropped.
struct Target {
  std::string_view path;   // as sent, starts with '/'
  std::string_view query;  // as sent, without '?'
};
// Throws Error(user) for a target without a path.
Target split_target(std::string_view target);

// "a=1&b=x%20y": decoded, '+' is a space. The first of equal names wins.
std::map<std::string, std::string> parse_query(std::string_view query);

// "/a/b" → {"a", "b"}, not decoded.
std::vector<std::string_view> split_path(std::string_view path);

}  // namespace ht::http
