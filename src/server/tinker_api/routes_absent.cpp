// What the SDK can ask for and this server does not have.

#include "server/tinker_api/routing.h"

namespace ht::tinker_api {
namespace {

http::Response absent(Context&, const http::Request& request) {
  throw HttpError(404, request.method + " " + request.path + " is not supported by this server");
}

http::Response absent_numbered(Context& context, const http::Request& request) {
  consume_refused(context, request);
  return absent(context, request);
}

}  // namespace

void add_absent_routes(http::Router& router, Context& context) {
  add(router, context, "POST", "/save_weights_external", absent_numbered);
  const std::pair<const char*, const char*> routes[] = {
      {"POST", "/auth/token"},
      {"GET", "/auth/apikey/me"},
      {"DELETE", "/auth/apikey/me"},
      {"POST", "/copy_weights"},
      {"POST", "/create_custom_loss"},
      {"POST", "/retrieve_futures"},
      {"POST", "/join_sampling_session"},
      {"POST", "/sessions/search"},
      {"PUT", "/sessions/{session}/project"},
      {"GET", "/sessions/{session}/trace_export"},
      {"GET", "/training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls"},
      {"GET", "/audit"},
      {"GET", "/billing/usage/events"},
      {"GET", "/billing/usage/checkpoints/current"},
  };
  for (const auto& [method, pattern] : routes) add(router, context, method, pattern, absent);
}

}  // namespace ht::tinker_api
