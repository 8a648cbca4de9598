#include "worker/stop_matcher.h"

#include <algorithm>

namespace ht::worker {

StopMatcher::StopMatcher(const std::vector<std::string>& stop_strings, const TokenTable* table)
    : stop_strings_(&stop_strings), table_(table) {
  for (const std::string& stop : stop_strings) longest_ = std::max(longest_, stop.size());
}

bool StopMatcher::feed(std::int32_t token) {
  if (longest_ == 0 || table_ == nullptr) return false;
  tail_ += table_->bytes(token);
  for (const std::string& stop : *stop_strings_) {
    if (!stop.empty() && tail_.find(stop) != std::string::npos) return true;
  }
  if (tail_.size() >= longest_) tail_.erase(0, tail_.size() - (longest_ - 1));
  return false;
}

}  // namespace ht::worker
