#include "base/error.h"
#include "server/http/http.h"
#include "server/http/url.h"

namespace ht::http {

namespace {

bool is_parameter(std::string_view segment) {
  return segment.size() > 2 && segment.front() == '{' && segment.back() == '}';
}

}  // namespace

void Router::add(std::string_view method, std::string_view pattern, Handler handler) {
  Route route{std::string(method), {}, std::move(handler)};
  for (const std::string_view segment : split_path(pattern)) route.segments.emplace_back(segment);
  routes_.push_back(std::move(route));
}

void Router::set_fallback(Handler handler) {
  fallback_ = std::move(handler);
}

const Handler* Router::fallback() const {
  return fallback_ ? &fallback_ : nullptr;
}

Router::Match Router::match(std::string_view method, std::string_view path) const {
  std::vector<std::string> segments;
  for (const std::string_view segment : split_path(path)) segments.push_back(percent_decode(segment));

  Match best;
  std::size_t fewest = 0;
  for (const Route& route : routes_) {
    if (route.segments.size() != segments.size()) continue;
    std::map<std::string, std::string> params;
    bool fits = true;
    for (std::size_t i = 0; fits && i < segments.size(); ++i) {
      const std::string& wanted = route.segments[i];
      if (!is_parameter(wanted)) {
        fits = wanted == segments[i];
      } else {
        fits = !segments[i].empty();
        params.emplace(wanted.substr(1, wanted.size() - 2), segments[i]);
      }
    }
    if (!fits) continue;
    best.path_known = true;
    // HEAD is GET without the body.
    if (route.method != method && !(method == "HEAD" && route.method == "GET")) continue;
    // A literal segment beats a parameter, whatever the order of add().
    if (best.handler != nullptr && params.size() >= fewest) continue;
    fewest = params.size();
    best.handler = &route.handler;
    best.params = std::move(params);
  }
  return best;
}

}  // namespace ht::http
