#pragma once

// One client's connection, and what all connections of a server share. Internal to this room.

#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>

#include <memory>
#include <unordered_set>

#include "server/http/http.h"

namespace ht::http {

class Connection;

// What one request's body takes of ServerOptions::max_bodies_bytes.
class BodyShare {
 public:
  BodyShare() = default;
  BodyShare(std::size_t& total, std::size_t limit) : total_(&total), limit_(limit) {}
  BodyShare(BodyShare&& other) noexcept { *this = std::move(other); }
  BodyShare& operator=(BodyShare&& other) noexcept {
    std::swap(total_, other.total_);
    std::swap(limit_, other.limit_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~BodyShare() {
    if (total_ != nullptr) *total_ -= bytes_;
  }
  // False: there is not as much left, and nothing changed.
  bool resize(std::size_t bytes) {
    if (bytes > bytes_ && bytes - bytes_ > limit_ - *total_) return false;
    *total_ += bytes - bytes_;
    bytes_ = bytes;
    return true;
  }

 private:
  std::size_t* total_ = nullptr;
  std::size_t limit_ = 0;
  std::size_t bytes_ = 0;
};

struct Shared {
  Shared(boost::asio::io_context& io_context, ServerOptions server_options, const Router& server_router)
      : io(io_context),
        options(std::move(server_options)),
        router(server_router),
        acceptor(io_context),
        grace_timer(io_context) {}

  boost::asio::io_context& io;
  const ServerOptions options;
  const Router& router;
  Server::RefusedBody on_refused_body;
  boost::asio::ip::tcp::acceptor acceptor;
  boost::asio::steady_timer grace_timer;
  std::unordered_set<std::shared_ptr<Connection>> connections;
  std::uint16_t port = 0;        // bound
  std::size_t bodies_bytes = 0;  // held by BodyShares
  bool stopping = false;
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(boost::asio::ip::tcp::socket socket, Shared& shared);

  // Serves requests until either side has had enough. `shared` outlives it.
  boost::asio::awaitable<void> run();
  // Closes the connection unless a request is being read, run or answered.
  void close_if_idle();
  // Cancels whatever runs and closes.
  void abort();
  boost::asio::cancellation_slot cancellation_slot() { return cancellation_.slot(); }

 private:
  enum class Next { answer, refuse, close };
  struct Incoming {
    Next next = Next::close;
    BodyShare share;
    Request request;
    std::string path;  // as sent
    bool keep_alive = false;
    Response refusal;  // Next::refuse: the connection is of no more use after it
  };

  boost::asio::awaitable<bool> wait_for_bytes();
  boost::asio::awaitable<void> read_request(Incoming& incoming);
  boost::asio::awaitable<Response> run_handler(Incoming& incoming);
  boost::asio::awaitable<bool> write(Response response, bool keep_alive, bool head_only);
  boost::asio::awaitable<void> linger();
  void refuse_body(Incoming& incoming);
  bool client_gone();

  Shared& shared_;
  boost::beast::tcp_stream stream_;
  boost::beast::flat_buffer buffer_;
  boost::asio::cancellation_signal cancellation_;
  bool idle_ = true;
  bool aborted_ = false;
};

}  // namespace ht::http
