#pragma once

// Runs the tokenizer helper, which writes the bytes of a model's tokens into a file.

#include <boost/asio/io_context.hpp>

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace ht::app {

struct TokenizerExport {
  std::vector<std::string> command;  // run as `<command> export MODEL_DIR OUT`
  std::filesystem::path model_dir;
  std::filesystem::path out;
};

// Calls `done` on the io_context's thread with an empty text when `out` is there, else with what went wrong. A file
// that is newer than the model's tokenizer is not made again. The helper is killed when `io` is destroyed.
void export_tokenizer(boost::asio::io_context& io, const TokenizerExport& request,
                      std::function<void(std::string error)> done);

}  // namespace ht::app
