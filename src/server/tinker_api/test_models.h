#pragma once

// What this room's tests share.

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "server/tinker_api/catalogue.h"

namespace ht::tinker_api {

// Vocabulary 100, context 16.
inline ServedModel small_model() {
  ServedModel model;
  model.names = {"test/small"};
  model.base_dir = "/models/small";
  model.spec.vocab_size = 100;
  model.max_seq_len = 16;
  return model;
}

// The message of the Error(user) that `action` throws.
inline std::string refusal(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

template <typename T>
std::vector<T> values_of(std::string_view bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

}  // namespace ht::tinker_api
