#pragma once

// How an endpoint is written here: a function of Context and Request that returns the answer or throws.

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/json.hpp>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>

#include "base/error.h"
#include "server/tinker_api/api.h"
#include "server/tinker_api/json_fields.h"

namespace ht::tinker_api {

// An Error(user) that is not a 400.
class HttpError : public Error {
 public:
  HttpError(int status, const std::string& message) : Error(ErrorCategory::user, message), status_(status) {}
  int status() const { return status_; }

 private:
  int status_;
};

using Endpoint = std::function<http::Response(Context&, const http::Request&)>;
using AsyncEndpoint = std::function<boost::asio::awaitable<http::Response>(Context&, const http::Request&)>;

// Checks the key, then answers with the endpoint. HttpError: its status; futures::Busy: 429; futures::Unavailable: 503;
// Error(user): 400.
void add(http::Router& router, Context& context, std::string_view method, std::string_view pattern, Endpoint endpoint);
void add_async(http::Router& router, Context& context, std::string_view method, std::string_view pattern,
               AsyncEndpoint endpoint);

http::Response json_response(const json::value& value, int status = 200);

// Runs `work` on the decode pool when `bytes` is above the limit, else here.
template <typename Work>
boost::asio::awaitable<std::invoke_result_t<Work>> offload(Context& context, std::size_t bytes, Work work) {
  if (bytes <= context.limits.offload_bytes) co_return work();
  using Result = std::invoke_result_t<Work>;
  co_return co_await boost::asio::co_spawn(
      context.decode_pool.get_executor(),
      [](Work run) -> boost::asio::awaitable<Result> { co_return run(); }(std::move(work)), boost::asio::use_awaitable);
}

// The session, if it goes on: 404 for an unknown one, 400 for one that is over.
const sessions::Session& active_session(Context& context, const std::string& id);
// 404 for an unknown one.
sessions::Model known_model(Context& context, const std::string& id);
sessions::Sampler known_sampler(Context& context, const std::string& id);
// 400 for a malformed path, 404 for one that is not there.
checkpoints::Checkpoint known_checkpoint(Context& context, std::string_view path);
// The base model in that directory. 404 when this server does not serve it (any more).
const ServedModel& served_dir(const Context& context, const std::string& base_dir, const std::string& name);

// Query parameter within [low, high]. Error(user) otherwise.
std::int64_t query_integer(const http::Request& request, const std::string& key, std::int64_t absent, std::int64_t low,
                           std::int64_t high);

void add_session_routes(http::Router& router, Context& context);
void add_model_routes(http::Router& router, Context& context);
void add_training_routes(http::Router& router, Context& context);
void add_weights_routes(http::Router& router, Context& context);
void add_sampling_routes(http::Router& router, Context& context);
void add_future_routes(http::Router& router, Context& context);
void add_rest_routes(http::Router& router, Context& context);
// Endpoints of the SDK that this server does not have: a 404 that says so.
void add_absent_routes(http::Router& router, Context& context);

}  // namespace ht::tinker_api
