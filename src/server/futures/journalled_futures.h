#pragma once

// The implementation of Futures over the journal and dispatch.

#include <boost/asio/io_context.hpp>

#include <chrono>
#include <cstddef>
#include <filesystem>
#include <memory>

#include "server/dispatch/dispatch.h"
#include "server/futures/futures.h"
#include "server/store/journal.h"

namespace ht::futures {

struct Options {
  std::filesystem::path data_dir;                               // absolute: what the journal's paths are below
  std::chrono::milliseconds retention = std::chrono::hours(1);  // of a finished result
  std::size_t retention_bytes = std::size_t{2} << 30;           // of all finished results
  std::size_t memory_bytes = std::size_t{256}
                             << 20;        // of requests and of results held in memory, each; more is re-read
  std::size_t max_queued_samples = 20000;  // then Busy
  // Training requests that were accepted and are not done, parked ones included: then Busy. One that all open requests
  // of its model wait for is accepted whatever there is: a gap can be filled.
  std::size_t max_model_requests = 8192;
  std::size_t max_model_bytes = std::size_t{2} << 30;
  std::size_t max_requests = 65536;               // of all models
  std::size_t max_bytes = std::size_t{16} << 30;  // ditto, and of samples
  std::chrono::milliseconds housekeeping{5000};
};

// Order at start: make_futures, set_completion for every operation, recover(), Dispatch::start().
class JournalledFutures : public Futures {
 public:
  // Rebuilds the table and the lanes from the journal. Throws Error(server) for a journal that cannot be understood.
  virtual void recover() = 0;
};

// Sets dispatch's events. `io`, `journal` and `dispatch` outlive the result.
std::unique_ptr<JournalledFutures> make_futures(boost::asio::io_context& io, store::Journal& journal,
                                                dispatch::Dispatch& dispatch, Options options = {});

}  // namespace ht::futures
