#include "server/app/loading_view.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace ht::app {

using dispatch::GroupState;

std::string loading_line(const Groups& groups) {
  constexpr std::size_t kWidth = 24;
  double fraction = 0;
  std::string text;
  for (const auto& [options, status] : groups) {
    fraction += status.state == GroupState::ready ? 1.0 : std::clamp(status.progress, 0.0, 1.0);
    if (text.empty() && status.state != GroupState::ready) text = options.name + ": " + status.text;
  }
  fraction /= groups.empty() ? 1.0 : static_cast<double>(groups.size());
  const auto filled = static_cast<std::size_t>(fraction * kWidth);
  return fmt::format("[{:<{}}] {:3.0f}%  {}", std::string(filled, '#'), kWidth, fraction * 100, text);
}

LoadingView::LoadingView() : terminal_(::isatty(STDERR_FILENO) == 1) {}

void LoadingView::show(const Groups& groups) {
  if (!terminal_) return;
  std::string line = loading_line(groups);
  winsize size{};
  const std::size_t columns = ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1U : 79;
  if (line.size() > columns) line.resize(columns);
  if (line == shown_) return;
  std::fprintf(stderr, "\r\033[K%s", line.c_str());
  std::fflush(stderr);
  shown_ = std::move(line);
}

void LoadingView::clear() {
  if (shown_.empty()) return;
  std::fputs("\r\033[K", stderr);
  std::fflush(stderr);
  shown_.clear();
}

}  // namespace ht::app
