#include "server/app/tokenizer_export.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>

#include <cerrno>
#include <cstring>
#include <memory>

extern char** environ;

namespace ht::app {

namespace asio = boost::asio;
namespace fs = std::filesystem;

namespace {

bool is_fresh(const TokenizerExport& request) {
  std::error_code error;
  const auto made = fs::last_write_time(request.out, error);
  if (error) return false;
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "config.json"}) {
    const auto changed = fs::last_write_time(request.model_dir / name, error);
    if (!error && changed > made) return false;
  }
  return true;
}

struct Helper {
  explicit Helper(asio::io_context& io) : exit(io) {}
  ~Helper() {
    if (pid <= 0) return;
    ::kill(-pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
  asio::posix::stream_descriptor exit;
  pid_t pid = 0;
};

// 0 or an errno. Nothing of ours is inherited but standard output and error.
int start(const std::vector<std::string>& arguments, pid_t* pid) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
  posix_spawn_file_actions_addclosefrom_np(&actions, 3);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK);
  posix_spawnattr_setpgroup(&attributes, 0);
  sigset_t none;
  sigemptyset(&none);
  posix_spawnattr_setsigmask(&attributes, &none);
  const int error = ::posix_spawnp(pid, argv[0], &actions, &attributes, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  return error;
}

}  // namespace

void export_tokenizer(asio::io_context& io, const TokenizerExport& request,
                      std::function<void(std::string error)> done) {
  if (is_fresh(request)) return asio::post(io, [done] { done({}); });
  const fs::path partial = request.out.string() + ".partial";
  std::vector<std::string> arguments = request.command;
  for (const std::string& more : {std::string("export"), request.model_dir.string(), partial.string()}) {
    arguments.push_back(more);
  }
  auto helper = std::make_shared<Helper>(io);
  int failure = start(arguments, &helper->pid);
  if (failure == 0) {
    const auto fd = static_cast<int>(::syscall(SYS_pidfd_open, helper->pid, 0U));
    if (fd < 0) {
      failure = errno;
    } else {
      helper->exit.assign(fd);
    }
  }
  if (failure != 0) {
    const std::string error = arguments[0] + " cannot be run: " + std::strerror(failure);
    return asio::post(io, [done, error] { done(error); });
  }
  auto& exit = helper->exit;
  exit.async_wait(asio::posix::stream_descriptor::wait_read, [helper = std::move(helper), partial, out = request.out,
                                                              done](const boost::system::error_code& error) {
    if (error) return;
    int status = 0;
    ::waitpid(helper->pid, &status, 0);
    helper->pid = 0;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      return done("the tokenizer helper failed (its message stands above)");
    }
    std::error_code renamed;
    fs::rename(partial, out, renamed);
    done(renamed ? out.string() + ": " + renamed.message() : std::string());
  });
}

}  // namespace ht::app
