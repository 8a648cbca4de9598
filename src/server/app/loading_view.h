#pragma once

#include <string>

#include "server/app/health.h"

namespace ht::app {

// One repainted line on standard error while models load. Does nothing unless that is a terminal.
class LoadingView {
 public:
  LoadingView();
  void show(const Groups& groups);
  // Leaves an empty line.
  void clear();

 private:
  bool terminal_ = false;
  std::string shown_;
};

// "[#####     ]  50%  tiny-1a2b3c4d: reading weights".
std::string loading_line(const Groups& groups);

}  // namespace ht::app
