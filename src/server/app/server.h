#pragma once

#include "server/app/options.h"

namespace ht::app {

// Serves until SIGINT or SIGTERM. Returns the exit status: 0 after a signal; 1 when a worker cannot load its model.
// Throws Error(user) for what the command line got wrong (port taken, data directory in use, no such model).
int serve(const ServeOptions& options);

}  // namespace ht::app
