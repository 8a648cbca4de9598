#include "server/http/connection.h"

#include <poll.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http.hpp>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/logging.h"
#include "server/http/url.h"

namespace ht::http {

namespace asio = boost::asio;
namespace beast = boost::beast;
using asio::awaitable;

namespace {

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);
constexpr std::size_t kIdleReadBytes = 2048;  // what an idle connection holds ready
// Of a refused body, for on_refused_body: a zstd frame gives nothing before its first block, of up to 128 KiB, is
// whole.
constexpr std::size_t kRefusedHeadBytes = 192 << 10;
constexpr std::size_t kBodyStepBytes = 64 << 10;  // the least and
constexpr std::size_t kBodyStepMax = 4 << 20;     // the most that a body grows by at once

// A body of `bytes` at 1 MiB a second is slow, but not stuck; a day bounds what a promised length can ask for.
std::chrono::seconds with_transfer_time(std::chrono::seconds base, std::uint64_t bytes) {
  return base + std::chrono::seconds(std::min<std::uint64_t>(bytes >> 20, 86400));
}

bool breaks_lines(std::string_view text) {
  return text.find_first_of(std::string_view("\r\n\0", 3)) != std::string_view::npos;
}

}  // namespace

Connection::Connection(asio::ip::tcp::socket socket, Shared& shared) : shared_(shared), stream_(std::move(socket)) {}

void Connection::close_if_idle() {
  if (!idle_) return;
  beast::error_code ignored;
  stream_.socket().shutdown(asio::ip::tcp::socket::shutdown_both, ignored);
  stream_.close();
}

void Connection::abort() {
  aborted_ = true;
  cancellation_.emit(asio::cancellation_type::terminal);
  stream_.close();
}

bool Connection::client_gone() {
  if (!stream_.socket().is_open()) return true;
  pollfd state{stream_.socket().native_handle(), POLLRDHUP, 0};
  return ::poll(&state, 1, 0) == 1 && (state.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

awaitable<void> Connection::run() {
  while (co_await wait_for_bytes()) {
    idle_ = false;
    Incoming incoming;
    co_await read_request(incoming);
    if (incoming.next == Next::close) break;
    if (incoming.next == Next::refuse) {
      if (co_await write(std::move(incoming.refusal), false, false)) co_await linger();
      break;
    }
    stream_.expires_never();
    Response response = co_await run_handler(incoming);
    const bool keep_alive = incoming.keep_alive && !shared_.stopping;
    const bool head_only = incoming.request.method == "HEAD";
    incoming = Incoming();
    if (!co_await write(std::move(response), keep_alive, head_only) || !keep_alive) break;
    idle_ = true;
    if (shared_.stopping) break;
  }
  beast::error_code ignored;
  stream_.socket().shutdown(asio::ip::tcp::socket::shutdown_both, ignored);
}

awaitable<bool> Connection::wait_for_bytes() {
  if (buffer_.size() > 0) co_return true;
  buffer_.shrink_to_fit();
  stream_.expires_after(shared_.options.idle_timeout);
  const auto [error, bytes] = co_await stream_.async_read_some(buffer_.prepare(kIdleReadBytes), kAwait);
  if (error) co_return false;
  buffer_.commit(bytes);
  co_return true;
}

awaitable<void> Connection::read_request(Incoming& incoming) {
  const ServerOptions& options = shared_.options;
  beast::http::request_parser<beast::http::buffer_body> parser;
  parser.header_limit(static_cast<std::uint32_t>(options.max_header_bytes));
  parser.body_limit(boost::none);  // counted below: a refused body's head is still wanted

  const auto refuse = [&incoming](int status, std::string_view message) {
    incoming.next = Next::refuse;
    incoming.refusal = error_response(status, message);
  };
  // The stream's own errors, timeouts among them, leave nobody to answer.
  const auto fail = [&](const beast::error_code& error) {
    static const auto& http_errors = make_error_code(beast::http::error::end_of_stream).category();
    if (error == beast::http::error::header_limit) {
      refuse(431, "the request's headers exceed " + std::to_string(options.max_header_bytes) + " bytes");
    } else if (error.category() == http_errors && error != beast::http::error::end_of_stream &&
               error != beast::http::error::partial_message) {
      refuse(400, "this is no HTTP/1.1 request: " + error.message());
    }
  };

  stream_.expires_after(options.read_timeout);
  if (const auto [error, bytes] = co_await beast::http::async_read_header(stream_, buffer_, parser, kAwait); error) {
    co_return fail(error);
  }
  const auto& head = parser.get();
  Request& request = incoming.request;
  request.method = std::string(head.method_string());
  for (const auto& field : head) request.headers.emplace_back(field.name_string(), field.value());
  incoming.keep_alive = head.keep_alive();
  std::string bad_target;
  try {
    const Target target = split_target(std::string_view(head.target().data(), head.target().size()));
    incoming.path = std::string(target.path);
    request.path = percent_decode(target.path);
    request.query = parse_query(target.query);
  } catch (const Error& error) {
    bad_target = error.what();
  }
  if (!bad_target.empty()) co_return refuse(400, bad_target);

  const boost::optional<std::uint64_t> length = parser.content_length();
  bool too_large = length && *length > options.max_body_bytes;
  stream_.expires_after(
      with_transfer_time(options.read_timeout, std::min<std::uint64_t>(length.value_or(0), options.max_body_bytes)));
  if (!too_large && beast::iequals(head[beast::http::field::expect], "100-continue")) {
    static constexpr std::string_view go_on = "HTTP/1.1 100 Continue\r\n\r\n";
    if (const auto [error, bytes] = co_await asio::async_write(stream_, asio::buffer(go_on), kAwait); error) co_return;
  }
  // Memory follows what has come, not what the header promises.
  std::string& body = request.body;
  incoming.share = BodyShare(shared_.bodies_bytes, options.max_bodies_bytes);
  const std::size_t cap = too_large ? kRefusedHeadBytes : options.max_body_bytes + 1;
  while (!parser.is_done() && body.size() < cap) {
    const std::size_t have = body.size();
    std::size_t step = std::min({std::clamp(have, kBodyStepBytes, kBodyStepMax), cap - have});
    if (length) step = std::min<std::uint64_t>(step, std::max<std::uint64_t>(*length - have, 1));
    if (!incoming.share.resize(have + step)) {
      refuse(503, "the request bodies in flight reach " + std::to_string(options.max_bodies_bytes) +
                      " bytes: try again later");
      incoming.refusal.headers.emplace_back("retry-after", "1");
      co_return;
    }
    body.resize(have + step);
    parser.get().body() = {body.data() + have, step, true};
    const auto [error, bytes] = co_await beast::http::async_read(stream_, buffer_, parser, kAwait);
    body.resize(have + step - parser.get().body().size);
    incoming.share.resize(body.size());
    if (error && error != beast::http::error::need_buffer) {
      // A broken transfer: whole requests only reach a handler.
      co_return fail(error);
    }
  }
  too_large = too_large || body.size() > options.max_body_bytes;
  if (too_large) {
    body.resize(std::min(body.size(), kRefusedHeadBytes));
    refuse_body(incoming);
    std::string size = length ? "of " + std::to_string(*length) + " bytes " : std::string();
    co_return refuse(400, "the request body " + size + "is too large: at most " +
                              std::to_string(options.max_body_bytes) + " bytes are accepted");
  }
  body.shrink_to_fit();
  incoming.next = Next::answer;
}

void Connection::refuse_body(Incoming& incoming) {
  if (!shared_.on_refused_body) return;
  try {
    incoming.request.params = shared_.router.match(incoming.request.method, incoming.path).params;
    incoming.request.client_gone = [] { return false; };
    shared_.on_refused_body(incoming.request);
  } catch (const std::exception& error) {
    spdlog::error("{} {}: a refused body: {}", incoming.request.method, incoming.path, error.what());
  }
}

awaitable<Response> Connection::run_handler(Incoming& incoming) {
  Request& request = incoming.request;
  try {
    Router::Match match = shared_.router.match(request.method, incoming.path);
    const Handler* handler = match.handler;
    if (handler == nullptr && match.path_known) {
      co_return error_response(405, request.method + " is not possible at " + incoming.path);
    }
    if (handler == nullptr) handler = shared_.router.fallback();
    if (handler == nullptr) co_return error_response(404, "there is nothing at " + incoming.path);
    request.params = std::move(match.params);
    request.client_gone = [connection = weak_from_this()] {
      const auto alive = connection.lock();
      return !alive || alive->client_gone();
    };
    Response response = co_await (*handler)(request);
    for (const auto& [name, value] : response.headers) {
      if (breaks_lines(name) || breaks_lines(value)) throw server_error("a response header contains a line break");
    }
    if (breaks_lines(response.content_type)) throw server_error("the content type contains a line break");
    co_return response;
  } catch (const Error& error) {
    if (error.category() == ErrorCategory::user) co_return error_response(400, error.what());
    spdlog::error("{} {}: {}", request.method, incoming.path, error.what());
    co_return error_response(500, error.what());
  } catch (const std::exception& error) {
    if (aborted_) throw;
    spdlog::error("{} {}: {}", request.method, incoming.path, error.what());
    co_return error_response(500, std::string("internal error: ") + error.what());
  }
}

awaitable<bool> Connection::write(Response response, bool keep_alive, bool head_only) {
  // A client of this protocol takes a 400 without content for the word of a proxy and retries it.
  if (response.status == 400 && response.body.empty()) {
    response.content_type = "application/json";
    response.body = error_response(400, "bad request").body;
  }
  stream_.expires_after(with_transfer_time(shared_.options.read_timeout, response.body.size()));
  beast::http::response<beast::http::string_body> message;
  message.version(11);
  message.result(static_cast<unsigned>(response.status));
  const bool has_body = response.status >= 200 && response.status != 204 && response.status != 304;
  for (const auto& [name, value] : response.headers) message.insert(name, value);
  if (has_body) {
    message.set(beast::http::field::content_type, response.content_type);
    message.content_length(response.body.size());
    if (!head_only) message.body() = std::move(response.body);
  }
  message.keep_alive(keep_alive);
  const auto [error, bytes] = co_await beast::http::async_write(stream_, message, kAwait);
  co_return !error;
}

// Closing a socket with unread bytes resets it, and the client may lose the answer: take what still comes for a while.
awaitable<void> Connection::linger() {
  beast::error_code failed;
  stream_.socket().shutdown(asio::ip::tcp::socket::shutdown_send, failed);
  if (failed) co_return;
  stream_.expires_after(shared_.options.read_timeout);
  std::string scrap(kBodyStepBytes, '\0');
  while (true) {
    const auto [error, bytes] = co_await stream_.async_read_some(asio::buffer(scrap), kAwait);
    if (error) co_return;
  }
}

}  // namespace ht::http
