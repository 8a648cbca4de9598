#pragma once

// The command line of hosted-tinker-server.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "server/store/journal.h"

namespace ht::app {

// native: the C++ engine, for the architectures of model_spec. pytorch: a worker in Python, for any causal LM of
// transformers.
enum class Backend { native, pytorch };

struct ServeOptions {
  // (name, directory as given), base models first. A base model given as a bare directory has its path as name.
  std::vector<std::pair<std::string, std::filesystem::path>> models;
  std::string host = "127.0.0.1";
  std::uint16_t port = 8000;
  std::filesystem::path data_dir;
  std::string backend_config = "{}";  // a JSON object
  int max_seq_len = 0;                // 0: the model's own
  int threads = 0;                    // 0: all cores
  store::Durability durability = store::Durability::process;
  std::size_t max_body_bytes = std::size_t{256} << 20;
  std::size_t max_decoded_bytes = std::size_t{512} << 20;
  std::size_t max_connections = 16384;
  std::size_t max_bodies_bytes = std::size_t{2} << 30;
  std::size_t max_queued_samples = 20000;
  // Of accepted training requests that are not done.
  std::size_t max_model_requests = 8192;
  std::size_t max_model_bytes = std::size_t{2} << 30;
  std::size_t max_requests = 65536;
  std::size_t max_requests_bytes = std::size_t{16} << 30;
  std::chrono::seconds session_timeout{300};
  double snapshot_seconds = 60;  // of compute between two snapshots
  Backend backend = Backend::native;
  std::filesystem::path worker_program;
  std::vector<std::string> worker_arguments;   // before those that name its lanes
  std::vector<std::string> tokenizer_command;  // empty: none
};

// Everything is said; the process ends with this status.
struct Exit {
  int status = 0;
};

// Prints help, version or what is wrong (to stderr, status 2). Throws Error(user) for values that parse but cannot be.
std::variant<ServeOptions, Exit> parse_command_line(int argc, const char* const* argv);

}  // namespace ht::app
