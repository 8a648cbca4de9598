#include "server/workers/process.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "worker_protocol/messages.h"

extern char** environ;

namespace ht::workers {

namespace {

// Closes on scope exit.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_ = -1;
};

[[noreturn]] void fail(const WorkerOptions& options, const std::string& what, int error) {
  throw server_error("cannot start the worker " + options.program.string() + ": " + what + ": " + std::strerror(error));
}

// Ours, with the torch libraries found first and OpenMP threads that sleep when idle, after a spin of about 0.1 ms:
// waking a thread for each small parallel region costs more than its work, and a longer spin takes cores from other
// programs.
std::vector<std::string> worker_environment() {
  std::vector<std::string> variables;
  std::string library_path;
  bool wait_policy = false;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view variable = *entry;
    if (variable.starts_with("LD_LIBRARY_PATH=")) {
      library_path = variable.substr(variable.find('=') + 1);
      continue;
    }
    wait_policy = wait_policy || variable.starts_with("OMP_WAIT_POLICY=") || variable.starts_with("GOMP_SPINCOUNT=");
    variables.emplace_back(variable);
  }
  if (const char* torch = std::getenv("HOSTED_TINKER_TORCH_LIB"); torch != nullptr && *torch != '\0') {
    library_path = library_path.empty() ? torch : torch + (":" + library_path);
  }
  if (!library_path.empty()) variables.push_back("LD_LIBRARY_PATH=" + library_path);
  if (!wait_policy) {
    variables.emplace_back("OMP_WAIT_POLICY=passive");
    variables.emplace_back("GOMP_SPINCOUNT=3000");
  }
  return variables;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> result;
  for (std::string& text : strings) result.push_back(text.data());
  result.push_back(nullptr);
  return result;
}

struct Child {
  const char* program;
  char** argv;
  char** envp;
  int input, log, report;
  std::array<int, 3> lanes;
  pid_t parent;
};

// Between fork and exec: async-signal-safe calls only.
[[noreturn]] void exec_child(const Child& child) {
  const auto give_up = [&child] {
    const int error = errno;
    [[maybe_unused]] const auto written = ::write(child.report, &error, sizeof error);
    ::_exit(127);
  };
  ::setpgid(0, 0);  // a Ctrl-C is ours to handle
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != child.parent) ::_exit(127);
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  ::signal(SIGPIPE, SIG_DFL);
  if (::dup2(child.input, STDIN_FILENO) < 0) give_up();
  if (child.log >= 0 && ::dup2(child.log, STDERR_FILENO) < 0) give_up();
  if (::dup2(STDERR_FILENO, STDOUT_FILENO) < 0) give_up();
  // Sockets of clients and files of the server end here.
  if (::syscall(SYS_close_range, 3U, ~0U, CLOSE_RANGE_CLOEXEC) < 0) {
    for (int fd = 3; fd < 65536; ++fd) ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  }
  for (const int fd : child.lanes) {
    if (::fcntl(fd, F_SETFD, 0) < 0) give_up();
  }
  ::execve(child.program, child.argv, child.envp);
  give_up();
  ::_exit(127);
}

}  // namespace

Process spawn(const WorkerOptions& options) {
  static constexpr std::array<std::string_view, 3> kNames{"--control-fd", "--training-fd", "--sampling-fd"};
  std::array<Fd, 3> ours, theirs;
  std::vector<std::string> arguments{options.program.string()};
  arguments.insert(arguments.end(), options.arguments.begin(), options.arguments.end());
  for (std::size_t lane = 0; lane < kNames.size(); ++lane) {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) fail(options, "socketpair", errno);
    ours[lane] = Fd(pair[0]);
    theirs[lane] = Fd(pair[1]);
    arguments.emplace_back(kNames[lane]);
    arguments.push_back(std::to_string(pair[1]));
  }
  const Fd input(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  if (input.get() < 0) fail(options, "/dev/null", errno);
  Fd log;
  if (!options.log_file.empty()) {
    log = Fd(::open(options.log_file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
    if (log.get() < 0) fail(options, options.log_file.string(), errno);
  }
  int report[2];
  if (::pipe2(report, O_CLOEXEC) < 0) fail(options, "pipe", errno);
  const Fd report_read(report[0]);
  Fd report_write(report[1]);

  std::vector<std::string> environment = worker_environment();
  std::vector<char*> argv = pointers(arguments);
  std::vector<char*> envp = pointers(environment);
  const Child child{arguments[0].c_str(),
                    argv.data(),
                    envp.data(),
                    input.get(),
                    log.get(),
                    report_write.get(),
                    {theirs[0].get(), theirs[1].get(), theirs[2].get()},
                    ::getpid()};
  Process process;
  process.pid = ::fork();
  if (process.pid < 0) fail(options, "fork", errno);
  if (process.pid == 0) exec_child(child);

  // The pipe closes when exec succeeds; until then the child has not run a line of the program.
  report_write = Fd();
  int error = 0;
  ssize_t got = 0;
  do {
    got = ::read(report_read.get(), &error, sizeof error);
  } while (got < 0 && errno == EINTR);
  if (got == sizeof error) {
    ::waitpid(process.pid, nullptr, 0);
    fail(options, "exec", error);
  }
  process.pidfd = static_cast<int>(::syscall(SYS_pidfd_open, process.pid, 0U));
  if (process.pidfd < 0) {
    const int failure = errno;
    ::kill(process.pid, SIGKILL);
    ::waitpid(process.pid, nullptr, 0);
    fail(options, "pidfd_open", failure);
  }
  for (std::size_t lane = 0; lane < process.lanes.size(); ++lane) process.lanes[lane] = ours[lane].release();
  return process;
}

std::string describe_exit(int status) {
  if (WIFSIGNALED(status)) {
    const int number = WTERMSIG(status);
    return "killed by signal " + std::to_string(number) + " (" + ::strsignal(number) + ")";
  }
  return "exit code " + std::to_string(WEXITSTATUS(status));
}

}  // namespace ht::workers
