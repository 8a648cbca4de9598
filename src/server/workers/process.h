#pragma once

// Starting a worker process. Internal to this room.

#include <sys/types.h>

#include <array>
#include <filesystem>
#include <string>

#include "server/workers/worker_group.h"

namespace ht::workers {

struct Process {
  pid_t pid = -1;
  int pidfd = -1;              // readable once the process is gone
  std::array<int, 3> lanes{};  // our ends, in Lane order
};

// Runs `options.program` in a process group of its own, with its lanes open, standard input empty, and killed by the
// kernel should we die. Throws Error(server) naming the program and the reason.
Process spawn(const WorkerOptions& options);

// "exit code 1", "killed by signal 9 (Killed)": of a status of waitpid.
std::string describe_exit(int status);

}  // namespace ht::workers
