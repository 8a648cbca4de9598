#pragma once

// The raw bytes of a body: content coding, the number inside a body that cannot be decoded, a digest.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace ht::tinker_api {

// A decoder stopped there: the body of a numbered request is searched this far for its number.
inline constexpr std::size_t kNumberScanBytes = 64 << 10;

// Decodes Content-Encoding `coding` ("" or "identity", "zstd"). Throws Error(user) for another coding, for damaged or
// truncated data and as soon as more than `max_bytes` come out; memory is bounded by max_bytes and zstd's window.
std::string decode_content(std::string_view coding, std::string_view body, std::size_t max_bytes);

// As much of the decoded body as comes out, at most `max_bytes`; never throws.
std::string decode_head(std::string_view coding, std::string_view body, std::size_t max_bytes);

struct Number {
  std::string model_id;
  std::int64_t seq_id = 0;
};

// Fields 1 (model_id) and 2 (seq_id) of a ForwardBackwardRequest that may be cut anywhere. Both are needed.
std::optional<Number> scan_protobuf_number(std::string_view head);
// "model_id" and "seq_id" of a JSON text that may be broken.
std::optional<Number> scan_json_number(std::string_view head);

// 128-bit digest in hex of a body, to tell a re-sent request from another one under the same key. Not cryptographic.
std::string digest(std::string_view body);

}  // namespace ht::tinker_api
