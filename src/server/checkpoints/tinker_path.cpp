#include <algorithm>
#include <cctype>

#include "base/error.h"
#include "server/checkpoints/checkpoints.h"

namespace ht::checkpoints {
namespace {

constexpr std::size_t kMaxName = 128;
constexpr std::size_t kMaxRun = 128;
constexpr std::string_view kScheme = "tinker://";
constexpr std::string_view kForm = "; the form is tinker://<training run>/weights|sampler_weights/<name>";

bool is_segment(std::string_view text, std::string_view punctuation, std::size_t longest) {
  return !text.empty() && text.size() <= longest && text.front() != '.' &&
         std::all_of(text.begin(), text.end(), [&](char c) {
           return std::isalnum(static_cast<unsigned char>(c)) != 0 || punctuation.find(c) != std::string_view::npos;
         });
}

}  // namespace

std::string_view name_of(Kind kind) {
  return kind == Kind::weights ? "weights" : "sampler_weights";
}
std::string_view type_of(Kind kind) {
  return kind == Kind::weights ? "training" : "sampler";
}

void check_name(std::string_view name) {
  if (!is_segment(name, "._- ", kMaxName)) {
    throw user_error("checkpoint name \"" + std::string(name.substr(0, 2 * kMaxName)) +
                     "\" is not allowed: it must have 1 to " + std::to_string(kMaxName) +
                     " letters, digits, '.', '_', '-' or ' ' and not begin with '.'");
  }
}

TinkerPath TinkerPath::parse(std::string_view text) {
  const std::string shown(text.substr(0, 400));
  if (!text.starts_with(kScheme)) throw user_error("\"" + shown + "\" is no tinker path" + std::string(kForm));
  const std::string_view rest = text.substr(kScheme.size());
  const std::size_t first = rest.find('/');
  const std::size_t second = first == std::string_view::npos ? first : rest.find('/', first + 1);
  if (second == std::string_view::npos || !is_segment(rest.substr(0, first), "._-:", kMaxRun)) {
    throw user_error("\"" + shown + "\" is no tinker path" + std::string(kForm));
  }
  TinkerPath path;
  path.run = rest.substr(0, first);
  const std::string_view kind = rest.substr(first + 1, second - first - 1);
  if (kind == name_of(Kind::weights)) {
    path.kind = Kind::weights;
  } else if (kind == name_of(Kind::sampler_weights)) {
    path.kind = Kind::sampler_weights;
  } else {
    throw user_error("\"" + shown + "\" names the kind \"" + std::string(kind) + "\"" + std::string(kForm));
  }
  path.name = rest.substr(second + 1);
  check_name(path.name);
  return path;
}

std::string TinkerPath::str() const {
  return std::string(kScheme) + run + "/" + checkpoint_id();
}
std::string TinkerPath::checkpoint_id() const {
  return std::string(name_of(kind)) + "/" + name;
}

}  // namespace ht::checkpoints
