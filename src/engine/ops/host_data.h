#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <span>

namespace ht::engine {

// A tensor over values in host memory, which must outlive it; .to(device) is a copy where the device's memory is
// another.
template <typename T>
at::Tensor host_data(std::span<const T> values) {
  return at::from_blob(const_cast<T*>(values.data()), {static_cast<std::int64_t>(values.size())},
                       at::TensorOptions(c10::CppTypeToScalarType<T>::value));
}

}  // namespace ht::engine
