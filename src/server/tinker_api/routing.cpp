#include "server/tinker_api/routing.h"

#include <charconv>

#include "base/logging.h"
#include "server/tinker_api/body.h"

namespace ht::tinker_api {
namespace {

bool accepted_key(std::string_view key) {
  return key.starts_with("tml-") || key.starts_with("eyJ");
}

http::Response retry_later(int status, std::string_view message) {
  http::Response response = http::error_response(status, message);
  response.headers.emplace_back("retry-after", "1");
  return response;
}

http::Response answer_error(const std::exception_ptr& thrown, const http::Request& request) {
  try {
    std::rethrow_exception(thrown);
  } catch (const HttpError& error) {
    return http::error_response(error.status(), error.what());
  } catch (const futures::Busy& error) {
    return retry_later(429, error.what());
  } catch (const futures::Unavailable& error) {
    return retry_later(503, error.what());
  } catch (const Error& error) {
    if (error.category() == ErrorCategory::user) return http::error_response(400, error.what());
    spdlog::error("{} {}: {}", request.method, request.path, error.what());
    return http::error_response(500, error.what());
  } catch (const std::exception& error) {
    spdlog::error("{} {}: {}", request.method, request.path, error.what());
    return http::error_response(500, "internal error; the server's log says more");
  }
}

}  // namespace

void add_async(http::Router& router, Context& context, std::string_view method, std::string_view pattern,
               AsyncEndpoint endpoint) {
  router.add(method, "/api/v1" + std::string(pattern),
             [&context,
              endpoint = std::move(endpoint)](const http::Request& request) -> boost::asio::awaitable<http::Response> {
               if (!accepted_key(request.header("x-api-key"))) {
                 co_return http::error_response(401, "X-API-Key must hold a key that starts with tml- or eyJ");
               }
               std::exception_ptr thrown;
               try {
                 co_return co_await endpoint(context, request);
               } catch (...) {
                 thrown = std::current_exception();
               }
               co_return answer_error(thrown, request);
             });
}

void add(http::Router& router, Context& context, std::string_view method, std::string_view pattern, Endpoint endpoint) {
  add_async(router, context, method, pattern,
            [endpoint = std::move(endpoint)](Context& own, const http::Request& request)
                -> boost::asio::awaitable<http::Response> { co_return endpoint(own, request); });
}

http::Response json_response(const json::value& value, int status) {
  http::Response response;
  response.status = status;
  response.body = json::serialize(value);
  return response;
}

const sessions::Session& active_session(Context& context, const std::string& id) {
  if (!context.sessions.find_session(id)) throw HttpError(404, "session \"" + id + "\" is unknown");
  return context.sessions.active_session(id);
}

sessions::Model known_model(Context& context, const std::string& id) {
  if (auto model = context.sessions.find_model(id)) return *std::move(model);
  throw HttpError(404, "model \"" + id + "\" is unknown");
}

sessions::Sampler known_sampler(Context& context, const std::string& id) {
  if (auto sampler = context.sessions.find_sampler(id)) return *std::move(sampler);
  throw HttpError(404, "sampling session \"" + id + "\" is unknown");
}

checkpoints::Checkpoint known_checkpoint(Context& context, std::string_view path) {
  if (auto found = context.checkpoints.find(checkpoints::TinkerPath::parse(path))) return *std::move(found);
  throw HttpError(404, "there is no checkpoint " + std::string(path) + ": it was never saved, was deleted or expired");
}

const ServedModel& served_dir(const Context& context, const std::string& base_dir, const std::string& name) {
  if (const ServedModel* model = context.catalogue.find_dir(base_dir)) return *model;
  throw HttpError(404, "base model \"" + name + "\" (" + base_dir + ") is not served by this server now");
}

std::int64_t query_integer(const http::Request& request, const std::string& key, std::int64_t absent, std::int64_t low,
                           std::int64_t high) {
  const auto found = request.query.find(key);
  if (found == request.query.end()) return absent;
  const std::string& text = found->second;
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < low || value > high) {
    throw user_error("query parameter " + key + " = \"" + text + "\" must be an integer in [" + std::to_string(low) +
                     ", " + std::to_string(high) + "]");
  }
  return value;
}

void register_routes(http::Router& router, Context& context) {
  add_session_routes(router, context);
  add_model_routes(router, context);
  add_training_routes(router, context);
  add_weights_routes(router, context);
  add_sampling_routes(router, context);
  add_future_routes(router, context);
  add_rest_routes(router, context);
  add_absent_routes(router, context);
  context.sessions.on_end([&context](const sessions::Session& session, const std::string& reason) {
    context.futures.end_session(session.id, context.sessions.models_of(session.id), reason);
    for (const std::string& id : context.sessions.samplers_of(session.id)) {
      const auto sampler = context.sessions.find_sampler(id);
      // What a session published goes with its models.
      if (!sampler || sampler->version.empty() || sampler->model_path.empty()) continue;
      if (!context.sessions.version_in_use(sampler->version)) {
        context.futures.drop_version(sampler->base_dir, sampler->version);
      }
    }
    sweep_versions(context);
  });
}

// A version without a checkpoint's path is named <session>:…, and lives as long as its session.
void sweep_versions(Context& context) {
  context.checkpoints.sweep_versions([&context](const std::string& version) {
    const auto session = context.sessions.find_session(version.substr(0, version.find(':')));
    return session && session->state == sessions::SessionState::active;
  });
}

void consume_refused(Context& context, const http::Request& head) {
  const std::string bytes = decode_head(head.header("content-encoding"), head.body, kNumberScanBytes);
  const bool is_json = head.header("content-type").find("json") != std::string_view::npos;
  const auto number = is_json ? scan_json_number(bytes) : scan_protobuf_number(bytes);
  if (number && context.sessions.find_model(number->model_id)) {
    context.futures.consume(number->model_id, number->seq_id);
  }
}

}  // namespace ht::tinker_api
