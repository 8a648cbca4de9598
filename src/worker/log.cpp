#include "worker/log.h"

#include "base/logging.h"

namespace ht::worker {

void init_log() {
  init_logging("worker", "info");
}
void log_warning(const std::string& text) {
  spdlog::warn("{}", text);
}
void log_error(const std::string& text) {
  spdlog::error("{}", text);
}

}  // namespace ht::worker
