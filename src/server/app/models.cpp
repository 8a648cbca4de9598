#include "server/app/models.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/json.hpp>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>

#include "base/error.h"

namespace ht::app {

namespace fs = std::filesystem;

namespace {

namespace json = boost::json;

// The first of `keys` that holds a whole number above 0, in config.json or in the text part of a model of several
// kinds.
std::optional<int> find_size(const json::object& config, std::initializer_list<std::string_view> keys) {
  const json::value* text = config.if_contains("text_config");
  const json::object* parts[] = {&config, text == nullptr ? nullptr : text->if_object()};
  for (const json::object* part : parts) {
    if (part == nullptr) continue;
    for (const std::string_view key : keys) {
      const json::value* value = part->if_contains(key);
      boost::system::error_code error;
      const int number = value == nullptr ? 0 : value->to_number<int>(error);
      if (!error && number > 0) return number;
    }
  }
  return std::nullopt;
}

// What requests are validated by, for an architecture that this program need not know: the worker, which does, checks
// again. The keys of the longest sequence are those of transformers' config classes.
model_spec::ModelSpec read_any_model(const fs::path& dir, int max_seq_len) {
  const fs::path file = dir / "config.json";
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw user_error(dir.string() + " is no model directory: it has no readable config.json");
  std::ostringstream text;
  text << stream.rdbuf();
  boost::system::error_code error;
  const json::value value = json::parse(text.str(), error);
  if (error || !value.is_object()) throw user_error(file.string() + " holds no JSON object");
  const json::object& config = value.get_object();
  model_spec::ModelSpec spec;
  const json::value* names = config.if_contains("architectures");
  if (names != nullptr && names->is_array() && !names->get_array().empty() && names->get_array().front().is_string()) {
    spec.architecture = names->get_array().front().get_string();
  }
  spec.vocab_size = find_size(config, {"vocab_size"}).value_or(std::numeric_limits<std::int32_t>::max());
  const std::optional<int> longest =
      find_size(config, {"max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len",
                         "seq_length", "model_max_length"});
  if (!longest && max_seq_len <= 0) {
    throw user_error(file.string() + " does not say how long a sequence may be: give --max-seq-len");
  }
  spec.max_position_embeddings = longest.value_or(max_seq_len);
  return spec;
}

}  // namespace

tinker_api::Catalogue load_catalogue(const ServeOptions& options) {
  tinker_api::Catalogue catalogue;
  for (const auto& [name, dir] : options.models) {
    std::error_code error;
    const fs::path canonical = fs::canonical(dir, error);
    if (error || !fs::is_directory(canonical)) {
      throw user_error("the model " + name + ": " + dir.string() + " is no directory");
    }
    tinker_api::ServedModel model;
    model.names = {name};
    model.base_dir = canonical.string();
    model.spec = options.backend == Backend::native ? model_spec::read_model_spec(canonical)
                                                    : read_any_model(canonical, options.max_seq_len);
    model.max_seq_len = model.spec.max_position_embeddings;
    if (options.max_seq_len > 0) model.max_seq_len = std::min(model.max_seq_len, options.max_seq_len);
    catalogue.add(std::move(model));
  }
  return catalogue;
}

std::string group_name(const std::string& base_dir) {
  // FNV-1a: directories of equal last names must not meet in one folder.
  std::uint64_t hash = 14695981039346656037ULL;
  for (const char c : base_dir) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
  return fmt::format("{}-{:08x}", fs::path(base_dir).filename().string(), static_cast<std::uint32_t>(hash >> 32));
}

}  // namespace ht::app
