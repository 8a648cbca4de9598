#include <stdexcept>

#include "base/error.h"
#include "server/http/test_server.h"
#include "server/http/url.h"

namespace ht::http {
namespace {

namespace asio = boost::asio;
using asio::awaitable;
using testing::Test;

TEST(Url, Decodes) {
  EXPECT_EQ(percent_decode("a%3Ab%2fc+d"), "a:b/c+d");
  EXPECT_THROW(percent_decode("%4"), Error);
  EXPECT_THROW(percent_decode("%zz"), Error);
  const auto query = parse_query("a=1&b=x%20y+z&a=2&flag&=&");
  EXPECT_EQ(query.at("a"), "1");
  EXPECT_EQ(query.at("b"), "x y z");
  EXPECT_EQ(query.at("flag"), "");
  EXPECT_EQ(split_target("http://host:1/a?b=c#d").path, "/a");
  EXPECT_EQ(split_target("/a?b=c#d").query, "b=c");
  EXPECT_THROW(split_target("a/b"), Error);
}

TEST_F(ServerTest, Routes) {
  router_.add("GET", "/api/v1/samplers/{id}", [](const Request& request) -> awaitable<Response> {
    co_return Response{200, "text/plain", request.params.at("id") + "|" + request.query.at("n"), {}};
  });
  router_.add("GET", "/api/v1/samplers/all", answer_with("literal"));
  router_.add("DELETE", "/runs/{run}/{kind}/{name}", [](const Request& request) -> awaitable<Response> {
    co_return Response{200, "text/plain", request.params.at("run") + "," + request.params.at("name"), {}};
  });
  start();
  EXPECT_EQ(get("/api/v1/samplers/s1:sample:0?n=7").body, "s1:sample:0|7");
  EXPECT_EQ(get("/api/v1/samplers/s1%3Asample%3A0?n=a%26b").body, "s1:sample:0|a&b");
  EXPECT_EQ(get("/api/v1/samplers/a%2Fb?n=").body, "a/b|");
  EXPECT_EQ(get("/api/v1/samplers/all").body, "literal");
  EXPECT_EQ(get("http://somewhere/api/v1/samplers/all").body, "literal");
  Client client(port());
  EXPECT_EQ(client.ask("DELETE /runs/r%3A1/weights/0001 HTTP/1.1\r\n\r\n").body, "r:1,0001");
  EXPECT_EQ(client.ask(get_text("/runs/r/weights/0001")).status, 405);
  EXPECT_EQ(client.ask(get_text("/runs/r/weights")).status, 404);
  EXPECT_EQ(client.ask(get_text("/runs//weights/x")).status, 404);
  EXPECT_EQ(client.ask(get_text("/%")).status, 400);
  EXPECT_EQ(get("nowhere").status, 400);
}

TEST_F(ServerTest, HeadHasNoBody) {
  router_.add("GET", "/x", answer_with("12345"));
  start();
  Client client(port());
  client.send("HEAD /x HTTP/1.1\r\n\r\n");
  const Answer answer = client.read(false);
  EXPECT_EQ(answer.status, 200);
  EXPECT_NE(answer.head.find("Content-Length: 5\r\n"), std::string::npos);
  EXPECT_EQ(client.ask(get_text("/x")).body, "12345");
}

TEST_F(ServerTest, Fallback) {
  router_.set_fallback([](const Request& request) -> awaitable<Response> {
    co_return error_response(404, "no " + request.path + " in this version");
  });
  start();
  EXPECT_EQ(get("/abc").body, R"({"detail":"no /abc in this version"})");
}

TEST_F(ServerTest, ExceptionsBecomeAnswers) {
  router_.add("GET", "/user", [](const Request&) -> awaitable<Response> {
    throw user_error("rank 3 is no power of two");
    co_return Response{};
  });
  router_.add("GET", "/server", [](const Request&) -> awaitable<Response> {
    throw server_error("disk full");
    co_return Response{};
  });
  router_.add("GET", "/bug", [](const Request&) -> awaitable<Response> {
    throw std::logic_error("oops");
    co_return Response{};
  });
  router_.add("GET", "/empty", [](const Request&) -> awaitable<Response> { co_return Response{400, "", "", {}}; });
  router_.add("GET", "/split", [](const Request&) -> awaitable<Response> {
    co_return Response{200, "text/plain", "", {{"X-A", "1\r\nX-B: 2"}}};
  });
  router_.add("GET", "/bytes", [](const Request&) -> awaitable<Response> {
    throw user_error("\xff\xc3\xa9");
    co_return Response{};
  });
  start();
  Client client(port());
  const Answer user = client.ask(get_text("/user"));
  EXPECT_EQ(user.status, 400);
  EXPECT_EQ(user.body, R"({"detail":"rank 3 is no power of two"})");
  EXPECT_EQ(client.ask(get_text("/server")).status, 500);
  EXPECT_EQ(client.ask(get_text("/bug")).status, 500);
  const Answer empty = client.ask(get_text("/empty"));
  EXPECT_EQ(empty.status, 400);
  EXPECT_GT(empty.body.size(), 0U);
  EXPECT_EQ(client.ask(get_text("/split")).status, 500);
  EXPECT_EQ(client.ask(get_text("/bytes")).body, "{\"detail\":\"?\xc3\xa9\"}");
}

TEST_F(ServerTest, RequestFields) {
  router_.add("POST", "/x", [](const Request& request) -> awaitable<Response> {
    co_return Response{200,
                       "text/plain",
                       request.method + " " + std::string(request.header("x-Tinker")) + " " +
                           std::string(request.header("absent")) + " " + request.body,
                       {{"X-Reply", "yes"}}};
  });
  start();
  Client client(port());
  const Answer answer = client.ask("POST /x HTTP/1.1\r\nX-TINKER: v\r\nContent-Length: 2\r\n\r\nhi");
  EXPECT_EQ(answer.body, "POST v  hi");
  EXPECT_NE(answer.head.find("X-Reply: yes\r\n"), std::string::npos);
}

TEST_F(ServerTest, PortTaken) {
  start();
  ServerOptions options;
  options.port = port();
  Server second(io_, options, router_);
  try {
    second.start();
    FAIL() << "two servers on one port";
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
    EXPECT_NE(std::string(error.what()).find("127.0.0.1:" + std::to_string(port())), std::string::npos);
  }
}

}  // namespace
}  // namespace ht::http
