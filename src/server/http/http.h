#pragma once

// The HTTP server's face. Beast stays behind it: handlers see these types only.

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ht::http {

struct Request {
  std::string method;                         // "GET"
  std::string path;                           // decoded, without the query
  std::map<std::string, std::string> params;  // {names} of the route's pattern, decoded
  std::map<std::string, std::string> query;   // decoded
  std::vector<std::pair<std::string, std::string>> headers;
  std::string body;  // as sent: Content-Encoding is the handler's business

  // Case-insensitive; empty when absent.
  std::string_view header(std::string_view name) const;
  // True once the client has closed the connection (a parked long poll). One poll(2); usable until the handler ends.
  std::function<bool()> client_gone;
};

struct Response {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};

// {"detail": message}: the shape of every error body.
Response error_response(int status, std::string_view message);

// Runs on the server's io_context thread. An exception becomes a response: Error(user) 400, anything else 500.
using Handler = std::function<boost::asio::awaitable<Response>(const Request&)>;

class Router {
 public:
  // Pattern segments: literal, or {name} for one non-empty segment; a literal beats a {name}. Unknown path: 404; known
  // path, other method: 405. HEAD is answered by GET's route, without the body.
  void add(std::string_view method, std::string_view pattern, Handler handler);
  // Answers paths without a route (default: 404 naming the path).
  void set_fallback(Handler handler);

  struct Match {
    const Handler* handler = nullptr;
    std::map<std::string, std::string> params;
    bool path_known = false;
  };
  // `path` as sent, percent-encoded: an encoded '/' does not end a segment. Throws Error(user) for a bad encoding.
  Match match(std::string_view method, std::string_view path) const;
  const Handler* fallback() const;

 private:
  struct Route {
    std::string method;
    std::vector<std::string> segments;
    Handler handler;
  };
  std::vector<Route> routes_;
  Handler fallback_;
};

struct ServerOptions {
  std::string host = "127.0.0.1";
  std::uint16_t port = 8000;  // 0: any free port
  std::size_t max_body_bytes = std::size_t{256} << 20;
  std::size_t max_bodies_bytes = std::size_t{2} << 30;  // of all requests being read or answered; then 503
  std::size_t max_header_bytes = 32 << 10;
  std::size_t max_connections = 16384;
  // Of one request once its first byte came, and of one response; each MiB of a body adds a second.
  std::chrono::seconds read_timeout{60};
  std::chrono::seconds idle_timeout{600};  // between requests
};

// HTTP/1.1, keep-alive, one coroutine a connection. A connection above max_connections gets a 503. `router` outlives
// it.
class Server {
 public:
  // An oversized body is given to `on_refused_body` (its first 64 KiB, for the sequence number in it), then answered
  // 400. `params` are those of the route that the request would have had.
  using RefusedBody = std::function<void(const Request& head_of_body)>;

  Server(boost::asio::io_context& io, ServerOptions options, const Router& router, RefusedBody on_refused_body = {});
  ~Server();

  // Binds and listens. Throws Error(user) naming host and port when they cannot be bound.
  void start();
  std::uint16_t port() const;
  // Returns at once. Refuses new connections, closes idle ones, lets running requests finish within `grace`, then
  // cancels their handlers (the pending await throws operation_aborted) and closes. Over when open_connections() is 0.
  void stop(std::chrono::milliseconds grace);

  std::size_t open_connections() const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace ht::http
