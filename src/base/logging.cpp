#include "base/logging.h"

#include <spdlog/sinks/ansicolor_sink.h>

#include <memory>

#include "base/error.h"

namespace ht {

void init_logging(const std::string& name, std::string_view level) {
  const std::string wanted(level);
  const auto parsed = spdlog::level::from_str(wanted);
  // from_str answers `off` for what it does not know.
  if (parsed == spdlog::level::off && wanted != "off") {
    throw user_error("log level \"" + wanted +
                     "\" is unknown; allowed: trace, debug, info, warning, error, critical, off");
  }
  auto logger = std::make_shared<spdlog::logger>(name, std::make_shared<spdlog::sinks::ansicolor_stderr_sink_mt>());
  logger->set_level(parsed);
  logger->set_pattern("%Y-%m-%d %H:%M:%S.%e %n %^%l%$: %v");
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace ht
