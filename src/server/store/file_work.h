#pragma once

// File system work that may take long (fsync, renaming, removing directories): on one thread of its own, in the order
// given, so that no poll and no heartbeat waits for a disk.

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>

#include <exception>
#include <functional>
#include <type_traits>
#include <utility>

namespace ht::store {

class FileWork {
 public:
  // `io` outlives it. Its end waits for the work that runs; what was not begun is dropped.
  explicit FileWork(boost::asio::io_context& io) : io_(io) {}

  // Calls `work` on the thread, then `then` on the io_context's with what `work` threw, or null.
  void post(std::function<void()> work, std::function<void(std::exception_ptr)> then) {
    boost::asio::post(
        thread_, [guard = boost::asio::make_work_guard(io_), work = std::move(work), then = std::move(then)]() mutable {
          std::exception_ptr thrown;
          try {
            work();
          } catch (...) {
            thrown = std::current_exception();
          }
          boost::asio::post(guard.get_executor(), [then = std::move(then), thrown] { then(thrown); });
        });
  }

  // What `work` returns or throws; the coroutine goes on where it runs.
  template <typename Work>
  boost::asio::awaitable<std::invoke_result_t<Work>> run(Work work) {
    using Result = std::invoke_result_t<Work>;
    co_return co_await boost::asio::co_spawn(
        thread_.get_executor(), [](Work own) -> boost::asio::awaitable<Result> { co_return own(); }(std::move(work)),
        boost::asio::use_awaitable);
  }

 private:
  boost::asio::io_context& io_;
  boost::asio::thread_pool thread_{1};
};

}  // namespace ht::store
