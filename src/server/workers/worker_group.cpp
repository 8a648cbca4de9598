#include "server/workers/worker_group.h"

#include <signal.h>
#include <sys/wait.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>

#include <algorithm>
#include <array>
#include <deque>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/logging.h"
#include "server/workers/process.h"
#include "worker_protocol/codec.h"

namespace ht::workers {

namespace asio = boost::asio;
namespace wp = worker_protocol;
using asio::local::stream_protocol;
using boost::system::error_code;

namespace {

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);
constexpr std::size_t kReadBytes = 256 << 10;
constexpr std::size_t kFramesPerWrite = 64;
constexpr std::chrono::seconds kEndGrace{5};     // from a closed stream to the end of the process
constexpr std::chrono::seconds kDrainLimit{60};  // for the replies that a dead process left behind

std::string_view name_of(wp::Lane lane) {
  static constexpr std::array<std::string_view, wp::kNumLanes> kNames{"control", "training", "sampling"};
  return kNames[static_cast<std::size_t>(lane)];
}

}  // namespace

struct WorkerGroup::Impl : std::enable_shared_from_this<WorkerGroup::Impl> {
  struct Stream {
    explicit Stream(asio::io_context& io) : socket(io) {}
    stream_protocol::socket socket;
    std::deque<std::string> queue;  // frames; the first `writing` are with the kernel
    std::size_t writing = 0;
    bool reading = false;
  };

  Impl(asio::io_context& io_context, WorkerOptions worker_options, Callbacks worker_callbacks)
      : io(io_context),
        options(std::move(worker_options)),
        callbacks(std::move(worker_callbacks)),
        streams{Stream(io), Stream(io), Stream(io)},
        process(io),
        timer(io) {}

  ~Impl() {
    if (pid <= 0) return;
    kill_group();
    ::waitpid(pid, nullptr, 0);
  }

  void start();
  void send(const wp::Request& request);
  void stop(std::chrono::milliseconds grace);
  void write_next(Stream& stream);
  asio::awaitable<void> read(wp::Lane lane);
  bool deliver(wp::Lane lane, const std::string& payload);
  void lane_ended(wp::Lane lane);
  void on_process_gone();
  void finish_when_drained();
  void kill_after(std::chrono::milliseconds wait, std::string why);
  void kill_now(std::string why);
  void kill_group() { ::kill(-pid, SIGKILL); }

  Stream& stream_of(wp::Lane lane) { return streams[static_cast<std::size_t>(lane)]; }

  asio::io_context& io;
  const WorkerOptions options;
  Callbacks callbacks;
  std::array<Stream, wp::kNumLanes> streams;
  asio::posix::stream_descriptor process;
  asio::steady_timer timer;
  pid_t pid = 0;         // 0: not started, or reaped
  bool closing = false;  // stop() was called
  bool exited = false;
  bool abandoned = false;   // the WorkerGroup is gone
  std::string kill_reason;  // why we killed it
  std::string reason;
};

void WorkerGroup::Impl::start() {
  const Process spawned = spawn(options);
  pid = spawned.pid;
  spdlog::debug("{}: worker {} started", options.name, pid);
  process.assign(spawned.pidfd);
  process.async_wait(asio::posix::stream_descriptor::wait_read, [self = shared_from_this()](const error_code& error) {
    if (!error) self->on_process_gone();
  });
  for (int i = 0; i < wp::kNumLanes; ++i) {
    const auto lane = static_cast<wp::Lane>(i);
    Stream& stream = stream_of(lane);
    stream.socket.assign(stream_protocol(), spawned.lanes[static_cast<std::size_t>(i)]);
    stream.reading = true;
    asio::co_spawn(io, read(lane), [self = shared_from_this(), lane](const std::exception_ptr& failure) {
      // What a callback throws is not ours to swallow.
      if (failure) std::rethrow_exception(failure);
      self->lane_ended(lane);
    });
  }
  for (Stream& stream : streams) write_next(stream);
}

void WorkerGroup::Impl::send(const wp::Request& request) {
  if (exited || closing) return;
  std::string payload = wp::encode(request);
  if (payload.size() > wp::kMaxFrameBytes) {
    throw user_error("a request of " + std::to_string(payload.size()) + " bytes is too large for the worker: at most " +
                     std::to_string(wp::kMaxFrameBytes));
  }
  Stream& stream = stream_of(wp::lane_of(request.body));
  stream.queue.push_back(wp::frame(payload));
  write_next(stream);
}

void WorkerGroup::Impl::write_next(Stream& stream) {
  if (stream.writing > 0 || !stream.socket.is_open()) return;
  if (stream.queue.empty()) {
    error_code ignored;
    if (closing) stream.socket.shutdown(stream_protocol::socket::shutdown_send, ignored);
    return;
  }
  stream.writing = std::min(stream.queue.size(), kFramesPerWrite);
  std::vector<asio::const_buffer> frames;
  for (std::size_t i = 0; i < stream.writing; ++i) frames.push_back(asio::buffer(stream.queue[i]));
  asio::async_write(stream.socket, frames, [self = shared_from_this(), &stream](const error_code& error, std::size_t) {
    const auto written = static_cast<std::ptrdiff_t>(std::exchange(stream.writing, 0));
    // A failed write: the process has gone or will be killed, and on_exit tells of it.
    if (error) return stream.queue.clear();
    stream.queue.erase(stream.queue.begin(), stream.queue.begin() + written);
    self->write_next(stream);
  });
}

asio::awaitable<void> WorkerGroup::Impl::read(wp::Lane lane) {
  const auto self = shared_from_this();
  Stream& stream = stream_of(lane);
  wp::FrameReader frames;
  std::string chunk(kReadBytes, '\0');
  while (true) {
    const auto [error, bytes] = co_await stream.socket.async_read_some(asio::buffer(chunk), kAwait);
    if (error) co_return;
    std::vector<std::string> payloads;
    std::string damage;
    try {
      frames.feed(std::string_view(chunk).substr(0, bytes));
      while (auto payload = frames.next()) payloads.push_back(std::move(*payload));
    } catch (const Error& failure) {
      damage = failure.what();
    }
    for (const std::string& payload : payloads) {
      if (!deliver(lane, payload)) co_return;
    }
    if (!damage.empty()) {
      kill_now("sent garbage on its " + std::string(name_of(lane)) + " stream: " + damage);
      co_return;
    }
  }
}

// False: the bytes were no reply, and nothing behind them can be trusted.
bool WorkerGroup::Impl::deliver(wp::Lane lane, const std::string& payload) {
  wp::Reply reply;
  try {
    reply = wp::decode_reply(payload);
  } catch (const Error& failure) {
    kill_now("sent garbage on its " + std::string(name_of(lane)) + " stream: " + failure.what());
    return false;
  }
  if (!abandoned && callbacks.on_reply) callbacks.on_reply(std::move(reply));
  return true;
}

void WorkerGroup::Impl::lane_ended(wp::Lane lane) {
  stream_of(lane).reading = false;
  if (exited) return finish_when_drained();
  // The streams of an ending process close shortly before it is gone.
  if (!closing && kill_reason.empty()) {
    kill_after(kEndGrace, "closed its " + std::string(name_of(lane)) + " stream and did not end");
  }
}

void WorkerGroup::Impl::kill_after(std::chrono::milliseconds wait, std::string why) {
  timer.expires_after(wait);
  timer.async_wait([self = shared_from_this(), why = std::move(why)](const error_code& error) {
    if (!error && !self->exited) self->kill_now(why);
  });
}

void WorkerGroup::Impl::kill_now(std::string why) {
  if (kill_reason.empty()) kill_reason = std::move(why);
  if (!exited) kill_group();
}

void WorkerGroup::Impl::stop(std::chrono::milliseconds grace) {
  if (exited || pid == 0) return;
  closing = true;
  for (Stream& stream : streams) write_next(stream);
  kill_after(grace, "did not end when asked to");
}

void WorkerGroup::Impl::on_process_gone() {
  // Whatever it started goes with it, and lets go of the streams: so that reading comes to an end. Before the process
  // is reaped, as its number is free afterwards.
  kill_group();
  int status = 0;
  ::waitpid(pid, &status, 0);
  pid = 0;
  exited = true;
  reason = describe_exit(status);
  if (!kill_reason.empty()) reason = kill_reason + " and was killed";
  process.close();
  timer.expires_after(kDrainLimit);
  timer.async_wait([self = shared_from_this()](const error_code& error) {
    if (error) return;
    for (Stream& stream : self->streams) stream.socket.close();
  });
  finish_when_drained();
}

void WorkerGroup::Impl::finish_when_drained() {
  if (std::any_of(streams.begin(), streams.end(), [](const Stream& stream) { return stream.reading; })) return;
  timer.cancel();
  for (Stream& stream : streams) stream.socket.close();
  spdlog::debug("{}: worker over: {}", options.name, reason);
  const auto on_exit = std::exchange(callbacks.on_exit, nullptr);
  if (!abandoned && on_exit) on_exit(reason);
}

WorkerGroup::WorkerGroup(asio::io_context& io, WorkerOptions options, Callbacks callbacks)
    : impl_(std::make_shared<Impl>(io, std::move(options), std::move(callbacks))) {}

WorkerGroup::~WorkerGroup() {
  impl_->abandoned = true;
  if (impl_->pid > 0) impl_->kill_group();
}

void WorkerGroup::start() {
  impl_->start();
}
void WorkerGroup::send(const wp::Request& request) {
  impl_->send(request);
}
void WorkerGroup::stop(std::chrono::milliseconds grace) {
  impl_->stop(grace);
}
int WorkerGroup::pid() const {
  return impl_->pid;
}

}  // namespace ht::workers
