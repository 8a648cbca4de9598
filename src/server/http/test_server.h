#pragma once

// A server on a thread of its own, and blocking clients, for this room's tests.

#include <gtest/gtest.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>

#include <memory>
#include <string>
#include <string_view>
#include <thread>

#include "server/http/http.h"

namespace ht::http {

struct Answer {
  int status = 0;  // 0: the connection closed before a whole answer came
  std::string head;
  std::string body;
};

class Client {
 public:
  explicit Client(std::uint16_t port);
  void send(std::string_view text);  // what cannot be sent any more is dropped
  Answer read(bool has_body = true);
  bool closed();  // waits for the server's end of the connection
  void close() { socket_.close(); }
  void finish_sending() { socket_.shutdown(boost::asio::ip::tcp::socket::shutdown_send); }
  Answer ask(std::string_view text) {
    send(text);
    return read();
  }

 private:
  boost::asio::io_context io_;
  boost::asio::ip::tcp::socket socket_{io_};
  std::string pending_;
};

class ServerTest : public testing::Test {
 protected:
  ~ServerTest() override;
  void start(ServerOptions options = {}, Server::RefusedBody on_refused_body = {});
  // On the server's thread, waiting for it.
  void on_server(const std::function<void()>& action);
  // Stops, and joins the thread: it ends only when nothing is left to do.
  void stop(std::chrono::milliseconds grace = std::chrono::milliseconds(0));
  std::uint16_t port() const { return server_->port(); }
  Answer get(std::string_view path);

  boost::asio::io_context io_{1};
  Router router_;
  std::unique_ptr<Server> server_;
  std::thread thread_;
};

// "GET /path HTTP/1.1" with a Host header and nothing else.
std::string get_text(std::string_view path);
std::string post_text(std::string_view path, std::string_view body);
Handler answer_with(std::string body);

}  // namespace ht::http
