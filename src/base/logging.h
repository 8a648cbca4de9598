#pragma once

#include <spdlog/spdlog.h>

#include <string>
#include <string_view>

namespace ht {

// Sends spdlog's default logger (spdlog::info(...) and so on) to standard error, in colour on a terminal:
//   2026-01-31 12:34:56.789 name info: message
// level: trace, debug, info, warning, error, critical, off. Error(user) for another one. Call it once, in main().
void init_logging(const std::string& name, std::string_view level);

}  // namespace ht
