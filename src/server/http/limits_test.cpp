#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>

#include <atomic>
#include <random>

#include "base/error.h"
#include "server/http/test_server.h"

namespace ht::http {
namespace {

namespace asio = boost::asio;
using asio::awaitable;
using std::chrono::milliseconds;
using std::chrono::seconds;
using Clock = std::chrono::steady_clock;

Handler echo_size() {
  return [](const Request& request) -> awaitable<Response> {
    co_return Response{200, "text/plain", std::to_string(request.body.size()), {}};
  };
}

TEST_F(ServerTest, PipelinedRequestsAreAnsweredInOrder) {
  router_.add("POST", "/x", [](const Request& request) -> awaitable<Response> {
    co_return Response{200, "text/plain", request.body, {}};
  });
  start();
  Client client(port());
  client.send(post_text("/x", "one") + post_text("/x", "two") + post_text("/x", "") + post_text("/x", "four"));
  EXPECT_EQ(client.read().body, "one");
  EXPECT_EQ(client.read().body, "two");
  EXPECT_EQ(client.read().body, "");
  EXPECT_EQ(client.read().body, "four");
  client.send("GET /x HTTP/1.1\r\nConnection: close\r\n\r\n");
  EXPECT_EQ(client.read().status, 405);
  EXPECT_TRUE(client.closed());
}

TEST_F(ServerTest, SlowClient) {
  router_.add("POST", "/x", echo_size());
  start();
  Client client(port());
  for (const char c : post_text("/x", "abc")) {
    client.send(std::string_view(&c, 1));
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_EQ(client.read().body, "3");
}

TEST_F(ServerTest, StalledRequestsAndIdleConnectionsAreClosed) {
  router_.add("POST", "/x", echo_size());
  ServerOptions options;
  options.read_timeout = seconds(1);
  options.idle_timeout = seconds(2);
  start(options);
  const auto begin = Clock::now();
  Client header(port()), body(port()), idle(port());
  header.send("POST /x HT");
  body.send("POST /x HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc");
  EXPECT_EQ(idle.ask(post_text("/x", "a")).status, 200);
  EXPECT_TRUE(header.closed());
  EXPECT_TRUE(body.closed());
  EXPECT_LT(Clock::now() - begin, milliseconds(1900));
  EXPECT_TRUE(idle.closed());
  EXPECT_GT(Clock::now() - begin, milliseconds(1900));
}

TEST_F(ServerTest, BodiesInFlightAreLimited) {
  std::atomic<bool> entered = false, go = false;
  router_.add("POST", "/x", [&](const Request& request) -> awaitable<Response> {
    entered = true;
    asio::steady_timer timer(co_await asio::this_coro::executor);
    while (!go) {
      timer.expires_after(milliseconds(1));
      co_await timer.async_wait(asio::use_awaitable);
    }
    co_return Response{200, "text/plain", std::to_string(request.body.size()), {}};
  });
  ServerOptions options;
  options.max_bodies_bytes = 1 << 20;
  int consumed = 0;
  start(options, [&](const Request&) { ++consumed; });
  const std::string large = post_text("/x", std::string(600 << 10, 'a'));
  Client first(port());
  first.send(large);
  while (!entered) std::this_thread::sleep_for(milliseconds(1));
  const Answer refused = Client(port()).ask(large);
  EXPECT_EQ(refused.status, 503);
  EXPECT_NE(refused.head.find("retry-after: 1"), std::string::npos) << refused.head;
  EXPECT_NE(refused.body.find("1048576"), std::string::npos);
  go = true;
  EXPECT_EQ(Client(port()).ask(post_text("/x", "small")).body, "5");
  EXPECT_EQ(first.read().body, "614400");
  for (int i = 0; i < 5; ++i) EXPECT_EQ(Client(port()).ask(large).body, "614400");  // nothing of it stays taken
  EXPECT_EQ(consumed, 0);
}

TEST_F(ServerTest, BodyLimit) {
  router_.add("POST", "/runs/{run}", echo_size());
  ServerOptions options;
  options.max_body_bytes = 1 << 20;
  std::vector<Request> refused;
  start(options, [&](const Request& head) { refused.push_back(head); });
  EXPECT_EQ(Client(port()).ask(post_text("/runs/r", std::string(1 << 20, 'a'))).body, "1048576");
  // The client sends all of it before it reads, as the SDK does.
  const Answer answer = Client(port()).ask(post_text("/runs/r%3A1", std::string(32 << 20, 'b')));
  EXPECT_EQ(answer.status, 400);
  EXPECT_NE(answer.body.find("33554432"), std::string::npos);
  EXPECT_NE(answer.body.find("1048576"), std::string::npos);
  // Chunked: nobody says beforehand how much it will be.
  Client chunked(port());
  chunked.send("POST /runs/r HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
  for (int i = 0; i < 20; ++i) chunked.send("10000\r\n" + std::string(0x10000, 'c') + "\r\n");
  EXPECT_EQ(chunked.read().status, 400);
  EXPECT_EQ(get("/runs/r").status, 405);
  stop();
  ASSERT_EQ(refused.size(), 2U);
  EXPECT_EQ(refused[0].params.at("run"), "r:1");
  EXPECT_EQ(refused[0].body, std::string(192 << 10, 'b'));
  EXPECT_EQ(refused[1].body, std::string(192 << 10, 'c'));
}

TEST_F(ServerTest, PromisedBytesTakeNoMemory) {
  router_.add("POST", "/x", echo_size());
  ServerOptions options;
  options.max_body_bytes = std::size_t{1} << 60;
  start(options);
  Client client(port());
  client.send("POST /x HTTP/1.1\r\nContent-Length: 1152921504606846975\r\n\r\nabc");
  Client huge(port());
  EXPECT_EQ(huge.ask("POST /x HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\nabc").status, 400);
  EXPECT_EQ(Client(port()).ask(post_text("/x", "ab")).body, "2");
}

TEST_F(ServerTest, HeaderLimit) {
  router_.add("GET", "/x", answer_with("ok"));
  start();
  EXPECT_EQ(Client(port()).ask("GET /x HTTP/1.1\r\nA: " + std::string(20000, 'a') + "\r\n\r\n").body, "ok");
  EXPECT_EQ(Client(port()).ask("GET /x HTTP/1.1\r\nA: " + std::string(40000, 'a') + "\r\n\r\n").status, 431);
  EXPECT_EQ(Client(port()).ask("GET /" + std::string(100000, 'a') + " HTTP/1.1\r\n\r\n").status, 431);
}

TEST_F(ServerTest, ChunkedBodiesAndExpect) {
  router_.add("POST", "/x", [](const Request& request) -> awaitable<Response> {
    co_return Response{200, "text/plain", request.body, {}};
  });
  start();
  Client client(port());
  const std::string head = "POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
  EXPECT_EQ(client.ask(head + "3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nTrailer: z\r\n\r\n").body, "abcdefg");
  EXPECT_EQ(client.ask("POST /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n").status, 100);
  EXPECT_EQ(client.ask("hi").body, "hi");
  EXPECT_EQ(client.ask(head + "zz\r\n").status, 400);
  EXPECT_TRUE(client.closed());
}

TEST_F(ServerTest, TruncatedBodyReachesNoHandler) {
  std::atomic<int> calls = 0;
  router_.add("POST", "/x", [&](const Request&) -> awaitable<Response> {
    ++calls;
    co_return Response{};
  });
  start();
  for (int i = 0; i < 10; ++i) {
    Client client(port());
    client.send("POST /x HTTP/1.1\r\nContent-Length: 100\r\n\r\n" + std::string(static_cast<std::size_t>(i) * 9, 'a'));
    client.finish_sending();
    EXPECT_EQ(client.read().status, 0);
  }
  EXPECT_EQ(Client(port()).ask(post_text("/x", "a")).status, 200);
  EXPECT_EQ(calls, 1);
}

TEST_F(ServerTest, GarbageIsAnswered400) {
  router_.add("GET", "/x", answer_with("ok"));
  start();
  EXPECT_EQ(Client(port()).ask("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n").status, 400);
  EXPECT_EQ(Client(port()).ask("GET /x HTTP/2.0\r\n\r\n").status, 400);
  EXPECT_EQ(Client(port()).ask("GET /x HTTP/1.1\r\nno colon\r\n\r\n").status, 400);
  EXPECT_EQ(Client(port()).ask("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").status, 400);
  std::mt19937 random(7);
  const std::string valid = post_text("/x?a=b", "0123456789");
  for (int round = 0; round < 300; ++round) {
    std::string bytes = valid;
    for (int i = 0; i < 4; ++i) bytes[random() % bytes.size()] = static_cast<char>(random());
    if (round % 3 == 0) {
      for (char& c : bytes) c = static_cast<char>(random());
    }
    Client client(port());
    client.send(bytes);
    client.finish_sending();
    const Answer answer = client.read();
    if (answer.status == 400) {
      EXPECT_GT(answer.body.size(), 0U);
    }
  }
  EXPECT_EQ(get("/x").body, "ok");
}

TEST_F(ServerTest, ConnectionLimit) {
  router_.add("GET", "/x", answer_with("ok"));
  ServerOptions options;
  options.max_connections = 2;
  start(options);
  Client first(port());
  EXPECT_EQ(first.ask(get_text("/x")).status, 200);
  {
    Client second(port());
    EXPECT_EQ(second.ask(get_text("/x")).status, 200);
    EXPECT_EQ(Client(port()).read().status, 503);
  }
  while (true) {
    std::size_t open = 0;
    on_server([&] { open = server_->open_connections(); });
    if (open == 1) break;
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_EQ(Client(port()).ask(get_text("/x")).status, 200);
}

}  // namespace
}  // namespace ht::http
