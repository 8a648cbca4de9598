#include "server/app/models.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "base/error.h"

namespace ht::app {

namespace fs = std::filesystem;

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
    model.spec = model_spec::read_model_spec(canonical);
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
