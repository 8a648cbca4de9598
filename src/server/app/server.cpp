#include "server/app/server.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "base/error.h"
#include "base/logging.h"
#include "server/app/data_dir.h"
#include "server/app/health.h"
#include "server/app/loading_view.h"
#include "server/app/models.h"
#include "server/app/tokenizer_export.h"
#include "server/checkpoints/checkpoints.h"
#include "server/dispatch/dispatch.h"
#include "server/futures/journalled_futures.h"
#include "server/http/http.h"
#include "server/sessions/sessions.h"
#include "server/store/database.h"
#include "server/store/file_work.h"
#include "server/store/journal.h"
#include "server/tinker_api/api.h"

namespace ht::app {

namespace asio = boost::asio;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

constexpr milliseconds kWatchPeriod{50};  // of the loading progress
constexpr int kLoadAttempts = 4;          // of a worker that was never ready
constexpr seconds kSessionExpiryPeriod{5};
constexpr milliseconds kCountersLimit{500};       // for a worker to tell healthz
constexpr seconds kSessionMemory{7 * 24 * 3600};  // of one that is over
constexpr int kCheckpointExpiryRounds = 12;       // session rounds to a checkpoint round
constexpr milliseconds kRequestGrace{1000};       // at the end, for running requests; parked polls come again elsewhere
constexpr seconds kShutdownLimit{10};

bool is_loopback(const std::string& host) {
  boost::system::error_code error;
  const auto address = asio::ip::make_address(host, error);
  return error ? host == "localhost" : address.is_loopback();
}

std::string url_of(const std::string& host, std::uint16_t port) {
  const bool v6 = host.find(':') != std::string::npos;
  return fmt::format("http://{}{}{}:{}", v6 ? "[" : "", host, v6 ? "]" : "", port);
}

// A parked poll is a file descriptor each.
void raise_file_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

http::ServerOptions http_options(const ServeOptions& options) {
  http::ServerOptions http;
  http.host = options.host;
  http.port = options.port;
  http.max_body_bytes = options.max_body_bytes;
  http.max_bodies_bytes = options.max_bodies_bytes;
  http.max_connections = options.max_connections;
  return http;
}

std::vector<dispatch::GroupOptions> groups_of(const ServeOptions& options, const tinker_api::Catalogue& catalogue) {
  std::vector<dispatch::GroupOptions> groups;
  for (const tinker_api::ServedModel& model : catalogue.models()) {
    dispatch::GroupOptions group;
    group.base_dir = model.base_dir;
    group.name = group_name(model.base_dir);
    group.worker_program = options.worker_program;
    group.worker_arguments = options.worker_arguments;
    group.initialize = {model.base_dir, options.backend_config, model.max_seq_len, options.threads};
    groups.push_back(std::move(group));
  }
  return groups;
}

dispatch::Options dispatch_options(const ServeOptions& serve, const DataDir& data) {
  dispatch::Options options;
  options.snapshot_dir = data.snapshots();
  options.snapshot_after_seconds = serve.snapshot_seconds;
  return options;
}

futures::Options futures_options(const ServeOptions& options, const DataDir& data) {
  futures::Options result;
  result.data_dir = data.path();
  result.max_queued_samples = options.max_queued_samples;
  result.max_model_requests = options.max_model_requests;
  result.max_model_bytes = options.max_model_bytes;
  result.max_requests = options.max_requests;
  result.max_bytes = options.max_requests_bytes;
  return result;
}

// The members' order is the order of the start; the port is taken before anything slow happens, and requests wait in
// the backlog until run().
class Application {
 public:
  explicit Application(const ServeOptions& options)
      : options_(options),
        catalogue_(load_catalogue(options)),
        data_(options.data_dir),
        server_(io_, http_options(options), router_,
                [this](const http::Request& head) { tinker_api::consume_refused(context_, head); }),
        listening_(listen()),
        database_(data_.path() / "server.sqlite", options.durability),
        sessions_(sessions::make_sessions(database_)),
        checkpoints_(checkpoints::make_checkpoints(database_, file_work_, data_.path())),
        journal_({.dir = data_.journal(), .durability = options.durability}),
        dispatch_(io_, dispatch_options(options, data_), groups_of(options, catalogue_)),
        futures_(futures::make_futures(io_, journal_, dispatch_, futures_options(options, data_))),
        context_{.sessions = *sessions_, .checkpoints = *checkpoints_, .futures = *futures_, .catalogue = catalogue_} {
    context_.loopback = is_loopback(options.host);
    context_.limits.max_decoded_bytes = options.max_decoded_bytes;
    tinker_api::set_completions(context_);
    futures_->recover();
    tinker_api::register_routes(router_, context_);
    for (const char* path : {"/healthz", "/api/v1/healthz"}) {
      router_.add("GET", path, [this](const http::Request&) -> asio::awaitable<http::Response> {
        co_await dispatch_.refresh_counters(kCountersLimit);
        co_return health(catalogue_, dispatch_.groups(), futures_->counts());
      });
    }
  }

  int run() {
    wait_for_signal();
    dispatch_.start();
    export_tokenizers();
    watch_loading();
    expire(0);
    io_.run();
    return status_;
  }

 private:
  bool listen() {
    server_.start();
    return true;
  }

  void wait_for_signal() {
    signals_.async_wait([this](const boost::system::error_code& error, int) {
      if (error) return;
      // Impatience: the workers die with us, and the journal has everything.
      if (stopping_) std::_Exit(130);
      shut_down(0);
      wait_for_signal();
    });
  }

  void shut_down(int status) {
    if (stopping_) return;
    stopping_ = true;
    status_ = status;
    view_.clear();
    watch_timer_.cancel();
    expiry_timer_.cancel();
    server_.stop(kRequestGrace);
    dispatch_.stop();
    shutdown_deadline_ = std::chrono::steady_clock::now() + kShutdownLimit;
    wait_for_end();
  }

  void wait_for_end() {
    const Groups groups = dispatch_.groups();
    const bool workers_gone =
        std::all_of(groups.begin(), groups.end(), [](const auto& g) { return g.second.pid == 0; });
    const bool late = std::chrono::steady_clock::now() > shutdown_deadline_;
    if ((workers_gone && server_.open_connections() == 0) || late) return io_.stop();
    watch_timer_.expires_after(milliseconds(10));
    watch_timer_.async_wait([this](const boost::system::error_code& error) {
      if (!error) wait_for_end();
    });
  }

  void watch_loading() {
    const Groups groups = dispatch_.groups();
    if (all_ready(groups)) {
      view_.clear();
      return announce(groups);
    }
    for (const auto& [group, status] : groups) {
      if (status.info || (!status.refused && status.restarts < kLoadAttempts)) continue;
      view_.clear();
      const std::string failed = status.refused ? "" : fmt::format(", the worker failed {} times", status.restarts);
      spdlog::error("{} cannot be served{}: {}", group.base_dir, failed, status.last_error);
      return shut_down(1);
    }
    view_.show(groups);
    watch_timer_.expires_after(kWatchPeriod);
    watch_timer_.async_wait([this](const boost::system::error_code& error) {
      if (!error && !stopping_) watch_loading();
    });
  }

  void announce(const Groups& groups) const {
    std::string names;
    for (const tinker_api::ServedModel& model : catalogue_.models()) {
      for (const std::string& name : model.names) names += (names.empty() ? "" : ", ") + name;
    }
    std::string text = fmt::format("hosted-tinker serves {} at {}\n", names, url_of(options_.host, server_.port()));
    for (const auto& [group, status] : groups) {
      if (!status.info) continue;
      text += fmt::format("{} on {}\n{}\n", group.name, status.info->device, status.info->memory_plan);
    }
    std::fputs(text.c_str(), stdout);
    std::fflush(stdout);
  }

  void export_tokenizers() {
    if (options_.tokenizer_command.empty()) {
      for (const tinker_api::ServedModel& model : catalogue_.models()) dispatch_.set_token_table(model.base_dir, {});
      return;
    }
    std::filesystem::create_directories(data_.tokenizers());
    for (const tinker_api::ServedModel& model : catalogue_.models()) {
      const auto out = data_.tokenizers() / (group_name(model.base_dir) + ".bin");
      export_tokenizer(io_, {options_.tokenizer_command, model.base_dir, out},
                       [this, base_dir = model.base_dir, out](const std::string& error) {
                         if (stopping_) return;
                         if (error.empty()) return dispatch_.set_token_table(base_dir, out.string());
                         spdlog::warn("{}: stop strings will be refused: {}", base_dir, error);
                         dispatch_.set_token_table(base_dir, {});
                       });
    }
  }

  void expire(int round) {
    try {
      sessions_->expire(options_.session_timeout);
      if (round % kCheckpointExpiryRounds == 0) {
        checkpoints_->expire();
        tinker_api::sweep_versions(context_);
        sessions_->forget(kSessionMemory, [this](const std::string& run) { return checkpoints_->has_run(run); });
      }
    } catch (const std::exception& error) {
      spdlog::error("expiry: {}", error.what());
    }
    expiry_timer_.expires_after(kSessionExpiryPeriod);
    expiry_timer_.async_wait([this, round](const boost::system::error_code& error) {
      if (!error && !stopping_) expire(round + 1);
    });
  }

  const ServeOptions options_;
  tinker_api::Catalogue catalogue_;
  DataDir data_;
  asio::io_context io_{1};
  http::Router router_;
  http::Server server_;
  bool listening_;
  store::FileWork file_work_{io_};
  store::Database database_;
  std::unique_ptr<sessions::Sessions> sessions_;
  std::unique_ptr<checkpoints::Checkpoints> checkpoints_;
  store::Journal journal_;
  dispatch::Dispatch dispatch_;
  std::unique_ptr<futures::JournalledFutures> futures_;
  tinker_api::Context context_;
  asio::signal_set signals_{io_, SIGINT, SIGTERM};
  asio::steady_timer watch_timer_{io_}, expiry_timer_{io_};
  LoadingView view_;
  bool stopping_ = false;
  int status_ = 0;
  std::chrono::steady_clock::time_point shutdown_deadline_;
};

}  // namespace

int serve(const ServeOptions& options) {
  std::signal(SIGPIPE, SIG_IGN);
  raise_file_limit();
  return Application(options).run();
}

}  // namespace ht::app
