#pragma once

// The worker's log lines. spdlog stays out of the other sources: the torch wheel carries another fmt, whose headers
// come first wherever libtorch is used.

#include <string>

namespace ht::worker {

void init_log();
void log_warning(const std::string& text);
void log_error(const std::string& text);

}  // namespace ht::worker
