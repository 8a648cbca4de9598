#include "server/tinker_api/body.h"

#include <zstd.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <memory>

#include "base/error.h"

namespace ht::tinker_api {
namespace {

struct FreeStream {
  void operator()(ZSTD_DCtx* stream) const { ZSTD_freeDCtx(stream); }
};

enum class Inflated { whole, truncated, too_large, damaged };

// Streams, and stops at max_bytes: the size that a frame declares is the sender's claim.
Inflated inflate(std::string_view body, std::size_t max_bytes, std::string& out, std::string& reason) {
  const std::unique_ptr<ZSTD_DCtx, FreeStream> stream(ZSTD_createDCtx());
  if (!stream) throw server_error("zstd: out of memory");
  const std::size_t step = std::max<std::size_t>(ZSTD_DStreamOutSize(), 4096);
  ZSTD_inBuffer in{body.data(), body.size(), 0};
  std::size_t size = 0;
  std::size_t state = 1;
  for (;;) {
    if (size == out.size()) out.resize(std::min(max_bytes + 1, std::max(step, out.size() * 2)));
    ZSTD_outBuffer piece{out.data(), out.size(), size};
    const std::size_t before_in = in.pos;
    state = ZSTD_decompressStream(stream.get(), &piece, &in);
    const bool progress = in.pos != before_in || piece.pos != size;
    size = piece.pos;
    if (ZSTD_isError(state)) {
      reason = ZSTD_getErrorName(state);
      out.resize(std::min(size, max_bytes));
      return Inflated::damaged;
    }
    if (size > max_bytes) {
      out.resize(max_bytes);
      return Inflated::too_large;
    }
    if (in.pos == in.size && (state == 0 || size < out.size())) break;
    if (!progress && size < out.size()) break;
  }
  out.resize(size);
  return state == 0 && in.pos == in.size ? Inflated::whole : Inflated::truncated;
}

// A base-128 varint. False at the end of the bytes, or after ten of them.
bool read_varint(std::string_view& bytes, std::uint64_t& value) {
  value = 0;
  for (std::size_t i = 0; i < 10 && i < bytes.size(); ++i) {
    const auto byte = static_cast<unsigned char>(bytes[i]);
    value |= static_cast<std::uint64_t>(byte & 0x7f) << (7 * i);
    if (byte < 0x80) {
      bytes.remove_prefix(i + 1);
      return true;
    }
  }
  return false;
}

// The text after `"key" :`, or nothing.
std::optional<std::string_view> after_key(std::string_view text, std::string_view key) {
  const std::string quoted = '"' + std::string(key) + '"';
  std::size_t at = text.find(quoted);
  while (at != std::string_view::npos) {
    const std::size_t colon = text.find_first_not_of(" \t\r\n", at + quoted.size());
    if (colon != std::string_view::npos && text[colon] == ':') {
      const std::size_t value = text.find_first_not_of(" \t\r\n", colon + 1);
      if (value == std::string_view::npos) return std::nullopt;
      return text.substr(value);
    }
    at = text.find(quoted, at + 1);
  }
  return std::nullopt;
}

}  // namespace

std::string decode_content(std::string_view coding, std::string_view body, std::size_t max_bytes) {
  if (coding.empty() || coding == "identity") {
    if (body.size() > max_bytes) {
      throw user_error("the body has " + std::to_string(body.size()) + " bytes; at most " + std::to_string(max_bytes) +
                       " are allowed");
    }
    return std::string(body);
  }
  if (coding != "zstd") {
    throw user_error("Content-Encoding \"" + std::string(coding) + "\" is not supported; allowed: zstd, identity");
  }
  std::string out, reason;
  switch (inflate(body, max_bytes, out, reason)) {
    case Inflated::whole:
      return out;
    case Inflated::truncated:
      throw user_error("the zstd body is truncated after " + std::to_string(body.size()) + " bytes");
    case Inflated::too_large:
      throw user_error("the zstd body decompresses to more than " + std::to_string(max_bytes) + " bytes, the limit");
    case Inflated::damaged:
      break;
  }
  throw user_error("the zstd body cannot be decompressed: " + reason);
}

std::string decode_head(std::string_view coding, std::string_view body, std::size_t max_bytes) {
  if (coding != "zstd") return std::string(body.substr(0, max_bytes));
  std::string out, reason;
  inflate(body, max_bytes, out, reason);
  return out;
}

std::optional<Number> scan_protobuf_number(std::string_view head) {
  Number number;
  std::uint64_t tag = 0, value = 0;
  while ((number.model_id.empty() || number.seq_id <= 0) && read_varint(head, tag)) {
    const std::uint64_t field = tag >> 3;
    switch (tag & 7) {
      case 0:
        if (!read_varint(head, value)) return std::nullopt;
        if (field == 2) number.seq_id = static_cast<std::int32_t>(value);
        break;
      case 1:
        if (head.size() < 8) return std::nullopt;
        head.remove_prefix(8);
        break;
      case 2:
        if (!read_varint(head, value) || value > head.size()) return std::nullopt;
        if (field == 1) number.model_id = head.substr(0, value);
        head.remove_prefix(value);
        break;
      case 5:
        if (head.size() < 4) return std::nullopt;
        head.remove_prefix(4);
        break;
      default:
        return std::nullopt;
    }
  }
  if (number.model_id.empty() || number.seq_id <= 0) return std::nullopt;
  return number;
}

std::optional<Number> scan_json_number(std::string_view head) {
  const auto model = after_key(head, "model_id");
  const auto seq = after_key(head, "seq_id");
  if (!model || !seq || model->front() != '"') return std::nullopt;
  const std::size_t end = model->find('"', 1);
  Number number;
  if (end == std::string_view::npos) return std::nullopt;
  number.model_id = model->substr(1, end - 1);
  const auto [last, error] = std::from_chars(seq->data(), seq->data() + seq->size(), number.seq_id);
  // A number that ends with the text may have lost digits.
  if (error != std::errc() || last == seq->data() + seq->size()) return std::nullopt;
  if (number.model_id.empty() || number.seq_id <= 0) return std::nullopt;
  return number;
}

std::string digest(std::string_view body) {
  // Two lanes of multiply-rotate over 8-byte words, finished as in SplitMix64 (Steele et al., 2014).
  std::uint64_t a = 0x9E3779B97F4A7C15ull ^ body.size(), b = 0xC2B2AE3D27D4EB4Full + body.size();
  for (std::size_t i = 0; i < body.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, body.data() + i, std::min<std::size_t>(8, body.size() - i));
    a = std::rotl((a ^ word) * 0x9FB21C651E98DF25ull, 29);
    b = std::rotl((b + word) * 0xD6E8FEB86659FD93ull, 37) ^ word;
  }
  const auto finish = [](std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  };
  char text[33];
  std::snprintf(text, sizeof text, "%016llx%016llx", static_cast<unsigned long long>(finish(a ^ std::rotl(b, 17))),
                static_cast<unsigned long long>(finish(b + a)));
  return text;
}

}  // namespace ht::tinker_api
