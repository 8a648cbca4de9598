// Long polls: many, cheap, and over when the client or the server goes.

#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>

#include <atomic>
#include <fstream>
#include <set>

#include "server/http/test_server.h"

namespace ht::http {
namespace {

namespace asio = boost::asio;
using asio::awaitable;
using std::chrono::milliseconds;

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMeasureMemory = false;
#else
constexpr bool kMeasureMemory = true;
#endif

std::size_t resident_bytes() {
  std::size_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

class ParkedTest : public ServerTest {
 protected:
  // Waits until release() or the client is gone.
  void park_at(const char* path) {
    router_.add("POST", path, [this](const Request& request) -> awaitable<Response> {
      ++parked_;
      asio::steady_timer timer(io_);
      timers_.insert(&timer);
      struct Leave {
        ParkedTest& test;
        asio::steady_timer* timer;
        ~Leave() {
          test.timers_.erase(timer);
          --test.parked_;
        }
      } leave{*this, &timer};
      while (!released_) {
        timer.expires_after(milliseconds(released_ ? 0 : 200));
        co_await timer.async_wait(kAwait);
        if (request.client_gone()) {
          ++gone_;
          co_return Response{};
        }
      }
      co_return Response{200, "text/plain", request.body, {}};
    });
  }
  void release() {
    on_server([this] {
      released_ = true;
      for (asio::steady_timer* timer : timers_) timer->cancel();
    });
  }
  void wait_for_parked(int count) {
    while (parked_ != count) std::this_thread::sleep_for(milliseconds(1));
  }

  std::atomic<int> parked_ = 0, gone_ = 0;
  bool released_ = false;
  std::set<asio::steady_timer*> timers_;
};

TEST_F(ParkedTest, ClientGone) {
  park_at("/poll");
  start();
  Client gone(port()), stays(port());
  gone.send(post_text("/poll", "a"));
  stays.send(post_text("/poll", "b") + get_text("/poll"));  // with the next request behind it
  wait_for_parked(2);
  gone.close();
  wait_for_parked(1);
  EXPECT_EQ(gone_, 1);
  release();
  EXPECT_EQ(stays.read().body, "b");
  EXPECT_EQ(stays.read().status, 405);
}

TEST_F(ParkedTest, StopLetsRequestsFinish) {
  park_at("/poll");
  start();
  Client running(port()), idle(port());
  running.send(post_text("/poll", "a"));
  wait_for_parked(1);
  on_server([this] { server_->stop(std::chrono::seconds(20)); });
  EXPECT_TRUE(idle.closed());
  EXPECT_THROW(Client late(port()), boost::system::system_error);
  release();
  const Answer answer = running.read();
  EXPECT_EQ(answer.body, "a");
  EXPECT_NE(answer.head.find("Connection: close"), std::string::npos);
  EXPECT_TRUE(running.closed());
  thread_.join();  // nothing is left to do, long before the grace is over
}

TEST_F(ParkedTest, StopCancelsAfterGrace) {
  park_at("/poll");
  start();
  Client running(port());
  running.send(post_text("/poll", "a"));
  wait_for_parked(1);
  stop(milliseconds(50));  // joins: the handler's coroutine has been unwound
  EXPECT_EQ(parked_, 0);
  EXPECT_EQ(running.read().status, 0);
}

TEST_F(ParkedTest, TwoThousandAreCheap) {
  constexpr int kConnections = 2000;
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  if (limit.rlim_max < 2 * kConnections + 100) GTEST_SKIP() << "only " << limit.rlim_max << " file descriptors";
  park_at("/poll");
  start();
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port());
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  // The headers that the SDK sends with a poll.
  const std::string request =
      "POST /poll HTTP/1.1\r\nhost: 127.0.0.1:8000\r\ncontent-type: application/json\r\naccept: application/json\r\n"
      "user-agent: AsyncTinker/Python 0.38.0\r\nx-api-key: tml-0123456789abcdef\r\nx-stainless-lang: python\r\n"
      "x-stainless-package-version: 0.38.0\r\nx-tinker-request-iteration: 0\r\ncontent-length: 49\r\n\r\n"
      R"({"request_id": "0123456789", "allow_metadata": 1})";
  const std::size_t before = resident_bytes();
  std::vector<int> sockets;
  for (int i = 0; i < kConnections; ++i) {
    const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
    ASSERT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    ASSERT_EQ(::send(fd, request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
    sockets.push_back(fd);
  }
  wait_for_parked(kConnections);
  const std::size_t used = resident_bytes() - before;
  RecordProperty("bytes_per_parked_poll", static_cast<int>(used / kConnections));
  std::printf("%zu bytes per parked poll\n", used / kConnections);
  if (kMeasureMemory) {
    EXPECT_LT(used, 20U << 20);
  }
  release();
  for (const int fd : sockets) {
    char status[12] = {};
    EXPECT_EQ(::recv(fd, status, sizeof status, MSG_WAITALL), static_cast<ssize_t>(sizeof status));
    EXPECT_EQ(std::string_view(status, sizeof status), "HTTP/1.1 200");
    ::close(fd);
  }
}

}  // namespace
}  // namespace ht::http
