#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>

#include "worker/log.h"
#include "worker/worker.h"

// Started by the server (server/workers), never by hand: it inherits one end of each lane's socket pair.
int main(int argc, char** argv) {
  CLI::App app{"hosted-tinker-worker: runs a base model and its adapters for hosted-tinker-server"};
  int control_fd = -1, training_fd = -1, sampling_fd = -1;
  app.add_option("--control-fd", control_fd, "Inherited stream of the control lane")->required();
  app.add_option("--training-fd", training_fd, "Inherited stream of the training lane")->required();
  app.add_option("--sampling-fd", sampling_fd, "Inherited stream of the sampling lane")->required();
  CLI11_PARSE(app, argc, argv);
  ht::worker::init_log();
  ::signal(SIGPIPE, SIG_IGN);
  try {
    ht::worker::Worker(control_fd, training_fd, sampling_fd).run();
  } catch (const std::exception& error) {
    ht::worker::log_error(error.what());
    ::_exit(1);
  }
}
