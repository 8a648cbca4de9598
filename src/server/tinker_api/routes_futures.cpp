// retrieve_future, cancel_future.

#include "server/tinker_api/routing.h"

namespace ht::tinker_api {
namespace {

using boost::asio::awaitable;

std::string_view name_of(ErrorCategory category) {
  switch (category) {
    case ErrorCategory::user:
      return "user";
    case ErrorCategory::server:
      return "server";
    case ErrorCategory::unknown:
      break;
  }
  return "unknown";
}

http::Response answer(const futures::Outcome& outcome) {
  if (const auto* failed = std::get_if<futures::Failed>(&outcome)) {
    return json_response(json::object{{"error", failed->message}, {"category", name_of(failed->category)}});
  }
  const auto& result = std::get<futures::Result>(outcome);
  http::Response response;
  response.content_type = result.content_type;
  response.body = result.body;
  return response;
}

awaitable<http::Response> retrieve_future(Context& context, const http::Request& request) {
  const json::object body = parse_object(request.body);
  const std::string id = Fields(body).text("request_id");
  const futures::Poll poll = co_await context.futures.poll(id, context.limits.poll_hold, request.client_gone);
  switch (poll.state) {
    case futures::PollState::done:
      co_return answer(*poll.outcome);
    case futures::PollState::gone:
      throw HttpError(410, "the result of request \"" + id + "\" is no longer kept");
    case futures::PollState::unknown:
      throw HttpError(404, "request \"" + id + "\" is unknown");
    case futures::PollState::pending:
      break;
  }
  json::object pending{{"type", "try_again"}, {"request_id", id}, {"queue_state", poll.queue_state}};
  if (!poll.queue_state_reason.empty()) pending["queue_state_reason"] = poll.queue_state_reason;
  // 408: the client polls again at once, quietly.
  co_return json_response(pending, 408);
}

http::Response cancel_future(Context& context, const http::Request& request) {
  const json::object body = parse_object(request.body);
  context.futures.cancel(Fields(body).text("request_id"));
  return json_response(json::object{});
}

}  // namespace

void add_future_routes(http::Router& router, Context& context) {
  add_async(router, context, "POST", "/retrieve_future", retrieve_future);
  add(router, context, "POST", "/cancel_future", cancel_future);
}

}  // namespace ht::tinker_api
