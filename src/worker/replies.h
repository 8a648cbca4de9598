#pragma once

#include <exception>
#include <functional>

#include "base/error.h"
#include "worker_protocol/messages.h"

namespace ht::worker {

// Queues a reply on the lane of its request. Never blocks.
using Send = std::function<void(worker_protocol::Reply)>;

// The category and text of anything thrown.
inline worker_protocol::Failure failure_of(const std::exception& error) {
  if (const auto* ours = dynamic_cast<const Error*>(&error)) return {ours->category(), ours->what()};
  return {ErrorCategory::server, error.what()};
}

}  // namespace ht::worker
