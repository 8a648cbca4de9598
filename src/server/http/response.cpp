#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>

#include <algorithm>

#include "server/http/http.h"

namespace ht::http {

namespace {

char lower(char c) {
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}

bool same_name(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (lower(a[i]) != lower(b[i])) return false;
  }
  return true;
}

// The length of the UTF-8 sequence that `text` starts with; 0: none.
std::size_t utf8_length(std::string_view text) {
  const auto first = static_cast<unsigned char>(text[0]);
  const std::size_t length = first < 0x80 ? 1 : first >= 0xC2 && first < 0xE0 ? 2 : (first >> 4) == 0xE ? 3 : 4;
  if (length > text.size() || (first >= 0x80 && first < 0xC2) || first > 0xF4) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((static_cast<unsigned char>(text[i]) & 0xC0) != 0x80) return 0;
  }
  return length;
}

// A message may quote what a client sent; JSON is UTF-8.
std::string as_utf8(std::string_view text) {
  std::string clean;
  while (!text.empty()) {
    const std::size_t length = utf8_length(text);
    clean += length == 0 ? std::string_view("?") : text.substr(0, length);
    text.remove_prefix(std::max<std::size_t>(length, 1));
  }
  return clean;
}

}  // namespace

std::string_view Request::header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (same_name(key, name)) return value;
  }
  return {};
}

Response error_response(int status, std::string_view message) {
  Response response;
  response.status = status;
  boost::json::object body;
  body["detail"] = as_utf8(message);
  response.body = boost::json::serialize(body);
  return response;
}

}  // namespace ht::http
