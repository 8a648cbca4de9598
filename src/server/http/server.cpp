#include <sys/socket.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/use_awaitable.hpp>

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/logging.h"
#include "server/http/connection.h"
#include "server/http/http.h"

namespace ht::http {

namespace asio = boost::asio;
using asio::awaitable;
using asio::ip::tcp;

namespace {

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);
constexpr int kBacklog = 4096;  // the kernel cuts it down to net.core.somaxconn

// No coroutine for a connection too many: what fits into the fresh socket's buffer is all it gets.
void turn_away(tcp::socket socket) {
  const Response response = error_response(503, "too many connections");
  const std::string text = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: " +
                           std::to_string(response.body.size()) + "\r\nRetry-After: 1\r\nConnection: close\r\n\r\n" +
                           response.body;
  ::send(socket.native_handle(), text.data(), text.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  boost::system::error_code ignored;
  socket.shutdown(tcp::socket::shutdown_send, ignored);
}

void serve(const std::shared_ptr<Shared>& shared, tcp::socket socket) {
  boost::system::error_code ignored;
  socket.set_option(tcp::no_delay(true), ignored);
  socket.set_option(asio::socket_base::keep_alive(true), ignored);
  auto connection = std::make_shared<Connection>(std::move(socket), *shared);
  shared->connections.insert(connection);
  auto over = [shared, connection](const std::exception_ptr& failure) {
    shared->connections.erase(connection);
    if (shared->stopping && shared->connections.empty()) shared->grace_timer.cancel();
    if (!failure || shared->stopping) return;
    try {
      std::rethrow_exception(failure);
    } catch (const std::exception& error) {
      spdlog::error("a connection ended: {}", error.what());
    }
  };
  asio::co_spawn(shared->io, connection->run(), asio::bind_cancellation_slot(connection->cancellation_slot(), over));
}

awaitable<void> accept_connections(std::shared_ptr<Shared> shared) {
  asio::steady_timer pause(shared->io);
  while (!shared->stopping) {
    auto [error, socket] = co_await shared->acceptor.async_accept(kAwait);
    if (shared->stopping) co_return;
    if (error == asio::error::connection_aborted) continue;
    if (error) {
      // Out of file descriptors, most likely: the clients wait in the backlog meanwhile.
      spdlog::error("cannot accept a connection: {}", error.message());
      pause.expires_after(std::chrono::milliseconds(100));
      co_await pause.async_wait(kAwait);
    } else if (shared->connections.size() >= shared->options.max_connections) {
      turn_away(std::move(socket));
    } else {
      serve(shared, std::move(socket));
    }
  }
}

}  // namespace

struct Server::Impl {
  std::shared_ptr<Shared> shared;
};

Server::Server(asio::io_context& io, ServerOptions options, const Router& router, RefusedBody on_refused_body)
    : impl_(std::make_shared<Impl>()) {
  impl_->shared = std::make_shared<Shared>(io, std::move(options), router);
  impl_->shared->on_refused_body = std::move(on_refused_body);
}

Server::~Server() {
  stop(std::chrono::milliseconds(0));
}

void Server::start() {
  Shared& shared = *impl_->shared;
  const ServerOptions& options = shared.options;
  const auto refuse = [&options](const boost::system::error_code& error) {
    throw user_error("cannot listen on " + options.host + ":" + std::to_string(options.port) + ": " + error.message());
  };
  boost::system::error_code error;
  const auto found = tcp::resolver(shared.io).resolve(options.host, std::to_string(options.port),
                                                      tcp::resolver::passive | tcp::resolver::numeric_service, error);
  if (error) refuse(error);
  std::vector<tcp::endpoint> endpoints;
  for (const auto& entry : found) endpoints.push_back(entry.endpoint());
  // "localhost" is 127.0.0.1 first: clients that were given the number must find us.
  std::stable_partition(endpoints.begin(), endpoints.end(),
                        [](const tcp::endpoint& endpoint) { return endpoint.address().is_v4(); });
  for (const tcp::endpoint& endpoint : endpoints) {
    shared.acceptor = tcp::acceptor(shared.io);
    shared.acceptor.open(endpoint.protocol(), error);
    if (!error) shared.acceptor.set_option(tcp::acceptor::reuse_address(true), error);
    if (!error) shared.acceptor.bind(endpoint, error);
    if (!error) shared.acceptor.listen(kBacklog, error);
    if (!error) break;
  }
  if (error) refuse(error);
  shared.port = shared.acceptor.local_endpoint().port();
  asio::co_spawn(shared.io, accept_connections(impl_->shared), asio::detached);
}

std::uint16_t Server::port() const {
  return impl_->shared->port;
}

void Server::stop(std::chrono::milliseconds grace) {
  const std::shared_ptr<Shared> shared = impl_->shared;
  shared->stopping = true;
  boost::system::error_code ignored;
  shared->acceptor.close(ignored);
  shared->grace_timer.cancel();
  const auto each = [](const Shared& all, auto&& action) {
    const std::vector<std::shared_ptr<Connection>> connections(all.connections.begin(), all.connections.end());
    for (const auto& connection : connections) action(*connection);
  };
  each(*shared, [](Connection& connection) { connection.close_if_idle(); });
  const auto abort_all = [shared, each] { each(*shared, [](Connection& connection) { connection.abort(); }); };
  if (grace.count() == 0) return abort_all();
  if (shared->connections.empty()) return;
  shared->grace_timer.expires_after(grace);
  shared->grace_timer.async_wait([abort_all](const boost::system::error_code& error) {
    if (!error) abort_all();
  });
}

std::size_t Server::open_connections() const {
  return impl_->shared->connections.size();
}

}  // namespace ht::http
