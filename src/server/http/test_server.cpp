#include "server/http/test_server.h"

#include <boost/asio/post.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>

#include <array>
#include <future>

namespace ht::http {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

Client::Client(std::uint16_t port) {
  socket_.connect(tcp::endpoint(asio::ip::make_address("127.0.0.1"), port));
}

void Client::send(std::string_view text) {
  error_code ignored;
  asio::write(socket_, asio::buffer(text), ignored);
}

Answer Client::read(bool has_body) {
  std::array<char, 65536> chunk;
  Answer answer;
  while (true) {
    const auto end = pending_.find("\r\n\r\n");
    if (end != std::string::npos) {
      const std::string head = pending_.substr(0, end + 2);
      const auto length_at = head.find("Content-Length: ");
      const std::size_t length =
          has_body && length_at != std::string::npos ? std::stoul(head.substr(length_at + 16)) : 0;
      if (pending_.size() >= end + 4 + length) {
        answer.status = std::stoi(head.substr(9));
        answer.head = head;
        answer.body = pending_.substr(end + 4, length);
        pending_.erase(0, end + 4 + length);
        return answer;
      }
    }
    error_code error;
    const std::size_t bytes = socket_.read_some(asio::buffer(chunk), error);
    if (error) return answer;
    pending_.append(chunk.data(), bytes);
  }
}

bool Client::closed() {
  std::array<char, 4096> chunk;
  error_code error;
  while (!error) socket_.read_some(asio::buffer(chunk), error);
  return true;
}

ServerTest::~ServerTest() {
  if (thread_.joinable()) stop();
}

void ServerTest::start(ServerOptions options, Server::RefusedBody on_refused_body) {
  options.port = 0;
  server_ = std::make_unique<Server>(io_, std::move(options), router_, std::move(on_refused_body));
  server_->start();
  thread_ = std::thread([this] { io_.run(); });
}

void ServerTest::on_server(const std::function<void()>& action) {
  std::promise<void> done;
  asio::post(io_, [&] {
    action();
    done.set_value();
  });
  done.get_future().wait();
}

void ServerTest::stop(std::chrono::milliseconds grace) {
  on_server([&] { server_->stop(grace); });
  thread_.join();
}

Answer ServerTest::get(std::string_view path) {
  return Client(port()).ask(get_text(path));
}

std::string get_text(std::string_view path) {
  return "GET " + std::string(path) + " HTTP/1.1\r\nHost: test\r\n\r\n";
}

std::string post_text(std::string_view path, std::string_view body) {
  return "POST " + std::string(path) + " HTTP/1.1\r\nHost: test\r\nContent-Length: " + std::to_string(body.size()) +
         "\r\n\r\n" + std::string(body);
}

Handler answer_with(std::string body) {
  return [body](const Request&) -> asio::awaitable<Response> { co_return Response{200, "text/plain", body, {}}; };
}

}  // namespace ht::http
