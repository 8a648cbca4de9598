#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "server/checkpoints/checkpoints.h"

namespace ht::tinker_api {

// One hour to ten years.
inline constexpr std::int64_t kMinTtlSeconds = 3600;
inline constexpr std::int64_t kMaxTtlSeconds = 315360000;

// What the completion of a save must know beside the worker's answer; it lies in the journal with the request.
struct SavedContext {
  checkpoints::TinkerPath path;
  std::string key;  // Checkpoint::request_id: the same for every repetition
  std::optional<std::int64_t> ttl_seconds;
  bool overwrite = false;
  std::map<std::string, std::string> user_metadata;

  std::string serialize() const;
  static SavedContext parse(const std::string& text);
};

}  // namespace ht::tinker_api
