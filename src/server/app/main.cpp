#include <cstdio>
#include <exception>

#include "base/logging.h"
#include "server/app/options.h"
#include "server/app/server.h"

int main(int argc, char** argv) {
  try {
    ht::init_logging("server", "info");
    const auto parsed = ht::app::parse_command_line(argc, argv);
    if (const auto* over = std::get_if<ht::app::Exit>(&parsed)) return over->status;
    return ht::app::serve(std::get<ht::app::ServeOptions>(parsed));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "hosted-tinker-server: %s\n", error.what());
    return 1;
  }
}
