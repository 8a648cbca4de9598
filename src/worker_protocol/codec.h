#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "worker_protocol/messages.h"

namespace ht::worker_protocol {

// Protobuf bytes of one message. decode_* throws Error(server) on bytes that are no such message.
std::string encode(const Request& request);
std::string encode(const Reply& reply);
Request decode_request(std::string_view bytes);
Reply decode_reply(std::string_view bytes);

// A frame on a stream: u32 little-endian length, then that many bytes.
inline constexpr std::size_t kMaxFrameBytes = std::size_t{1} << 30;
std::string frame(std::string_view payload);

// Cuts a byte stream into frames.
class FrameReader {
 public:
  void feed(std::string_view bytes);
  // The next whole payload, or nothing. Throws Error(server) for a length above kMaxFrameBytes.
  std::optional<std::string> next();

 private:
  std::string buffer_;
  std::size_t offset_ = 0;
};

}  // namespace ht::worker_protocol
