#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace ht {

// The categories of the SDK's RequestFailedError.
enum class ErrorCategory { user, server, unknown };

// Thrown for anything that a request's author must be told. The message names the value and what is allowed.
// `user`: the input is wrong, repeating it is pointless. `server`: our fault or the machine's.
class Error : public std::runtime_error {
 public:
  Error(ErrorCategory category, const std::string& message) : std::runtime_error(message), category_(category) {}
  ErrorCategory category() const { return category_; }

 private:
  ErrorCategory category_;
};

inline Error user_error(const std::string& message) {
  return Error(ErrorCategory::user, message);
}
inline Error server_error(const std::string& message) {
  return Error(ErrorCategory::server, message);
}

}  // namespace ht
