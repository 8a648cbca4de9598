#include <cstring>

#include "base/error.h"
#include "worker_protocol/codec.h"

namespace ht::worker_protocol {
namespace {

constexpr std::size_t kPrefix = 4;

void check_length(std::size_t length) {
  if (length > kMaxFrameBytes) {
    throw server_error("a frame of " + std::to_string(length) + " bytes exceeds the limit of " +
                       std::to_string(kMaxFrameBytes));
  }
}

}  // namespace

std::string frame(std::string_view payload) {
  check_length(payload.size());
  const auto length = static_cast<std::uint32_t>(payload.size());
  std::string out;
  out.reserve(kPrefix + payload.size());
  for (unsigned shift = 0; shift < 32; shift += 8) out.push_back(static_cast<char>(length >> shift));
  out.append(payload);
  return out;
}

void FrameReader::feed(std::string_view bytes) {
  // What was read goes before the buffer grows: amortised, each byte moves at most once more.
  if (offset_ > 0 && offset_ >= buffer_.size() / 2) {
    buffer_.erase(0, offset_);
    offset_ = 0;
  }
  buffer_.append(bytes);
}

std::optional<std::string> FrameReader::next() {
  if (buffer_.size() - offset_ < kPrefix) return std::nullopt;
  std::uint32_t length = 0;
  for (std::size_t i = 0; i < kPrefix; ++i) {
    length |= std::uint32_t{static_cast<unsigned char>(buffer_[offset_ + i])} << (8 * i);
  }
  check_length(length);
  if (buffer_.size() - offset_ - kPrefix < length) return std::nullopt;
  std::string payload = buffer_.substr(offset_ + kPrefix, length);
  offset_ += kPrefix + length;
  if (offset_ == buffer_.size()) {
    // The memory of a large frame is given back; a small buffer is kept.
    if (buffer_.capacity() > (std::size_t{1} << 20)) {
      buffer_ = {};
    } else {
      buffer_.clear();
    }
    offset_ = 0;
  }
  return payload;
}

}  // namespace ht::worker_protocol
