#pragma once

// The endpoints of the official SDK (0.38): decode → validate → submit; encode ← result.

#include <boost/asio/thread_pool.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

#include "server/checkpoints/checkpoints.h"
#include "server/futures/futures.h"
#include "server/http/http.h"
#include "server/sessions/sessions.h"
#include "server/tinker_api/catalogue.h"

namespace ht::tinker_api {

struct Limits {
  std::size_t max_decoded_bytes = std::size_t{512} << 20;  // of one body after zstd
  std::size_t offload_bytes = std::size_t{256} << 10;      // larger bodies are decoded off the io thread
  std::size_t max_datums = 65536;                          // of one forward_backward
  std::int64_t max_target_width = 4096;                    // K of (N, K) targets
  std::int64_t max_target_cells = std::int64_t{1} << 25;   // of one request, after a CSR tensor became dense
  std::int64_t max_result_cells = std::int64_t{1} << 26;   // (token, logprob) pairs that a sample may return: 512 MiB
  int max_num_samples = 1024;
  int max_topk = 1024;                // topk_*_logprobs and prompt_alt_tokens_k
  int max_stops = 64;                 // stop strings, or stop tokens
  std::size_t max_stop_bytes = 1024;  // of one stop string
  std::chrono::milliseconds poll_hold{30000};
};

// What the endpoints work with. The referenced objects outlive the routes.
struct Context {
  sessions::Sessions& sessions;
  checkpoints::Checkpoints& checkpoints;
  futures::Futures& futures;
  Catalogue catalogue;
  // The server listens on loopback: clients see our file system, so a model directory may serve as tokenizer_id.
  bool loopback = true;
  std::string model_owner = "local";
  Limits limits;
  boost::asio::thread_pool decode_pool{2};
};

// Sets the completion of every operation. Before the recovery of `context.futures`.
void set_completions(Context& context);

// Adds all endpoints under /api/v1, and has ended sessions cleaned up. `context` outlives the router.
void register_routes(http::Router& router, Context& context);

// Deletes the files of sampler versions whose session is over. At the start, and now and then.
void sweep_versions(Context& context);

// For http::Server's RefusedBody: finds model and number in the head of the body and consumes the number, if any.
void consume_refused(Context& context, const http::Request& head);

}  // namespace ht::tinker_api
