#include <bit>
#include <cstring>

#include "base/error.h"
#include "safetensors/safetensors.h"

namespace ht::safetensors {
namespace {

// Elements are read with memcpy: a tensor in a file may start at any byte.
template <typename T>
T load(const std::byte* data, std::int64_t index) {
  T value;
  std::memcpy(&value, data + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

float f16_to_f32(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1f;
  const std::uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1.0p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

}  // namespace

void read_rows_f32(const TensorView& view, std::int64_t row_begin, std::int64_t row_end, float* out) {
  if (view.shape.empty() || view.shape.size() > 2) {
    throw user_error("only 1-D and 2-D tensors can be read by rows, this one has " + std::to_string(view.shape.size()) +
                     " dimensions");
  }
  const std::int64_t rows = view.shape[0];
  const std::int64_t width = view.shape.size() == 2 ? view.shape[1] : 1;
  if (row_begin < 0 || row_begin > row_end || row_end > rows) {
    throw user_error("rows [" + std::to_string(row_begin) + ", " + std::to_string(row_end) +
                     ") are outside a tensor of " + std::to_string(rows) + " rows");
  }
  const std::int64_t begin = row_begin * width;
  const std::int64_t count = (row_end - row_begin) * width;
  if (count == 0) return;
  const std::byte* data = view.data + static_cast<std::size_t>(begin) * size_of(view.dtype);
  switch (view.dtype) {
    case DType::f32:
      std::memcpy(out, data, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case DType::bf16:
      for (std::int64_t i = 0; i < count; ++i) {
        out[i] = std::bit_cast<float>(std::uint32_t{load<std::uint16_t>(data, i)} << 16);
      }
      return;
    case DType::f16:
      for (std::int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(load<std::uint16_t>(data, i));
      return;
    case DType::f64:
      for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(load<double>(data, i));
      return;
    case DType::i64:
    case DType::i32:
    case DType::u8:
      break;
  }
  throw user_error("a tensor of dtype " + std::string(name_of(view.dtype)) +
                   " cannot be read as float32; allowed: F32, BF16, F16, F64");
}

}  // namespace ht::safetensors
