#pragma once

// What both codecs need: arrays as little-endian bytes, checked enumerations, whole messages. Included by codec_*.cpp
// only.

#include <bit>
#include <climits>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/error.h"
#include "worker.pb.h"
#include "worker_protocol/messages.h"

namespace ht::worker_protocol {

static_assert(std::endian::native == std::endian::little, "arrays travel as the bytes of a little-endian machine");

template <typename T>
void put_array(std::string* out, const std::vector<T>& values) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) == 4);
  if (!values.empty()) out->assign(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

template <typename T>
void take_array(const std::string& bytes, std::vector<T>& out, const char* field) {
  if (bytes.size() % sizeof(T) != 0) {
    throw server_error(std::string("worker message: field ") + field + " has " + std::to_string(bytes.size()) +
                       " bytes, no multiple of 4");
  }
  out.resize(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(out.data(), bytes.data(), bytes.size());
}

template <typename Enum>
Enum take_enum(int value, Enum first, Enum last, const char* field) {
  if (value < static_cast<int>(first) || value > static_cast<int>(last)) {
    throw server_error(std::string("worker message: field ") + field + " has the unknown value " +
                       std::to_string(value));
  }
  return static_cast<Enum>(value);
}

template <typename Message>
std::string to_bytes(const Message& message, const char* what) {
  std::string bytes;
  // Fails only above 2 GiB.
  if (!message.SerializeToString(&bytes)) throw server_error(std::string("a ") + what + " is too large to be sent");
  return bytes;
}

template <typename Message>
Message from_bytes(std::string_view bytes, const char* what) {
  Message message;
  if (bytes.size() > INT_MAX || !message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    throw server_error("the " + std::to_string(bytes.size()) + " bytes received are no " + what);
  }
  return message;
}

inline void put(pb::MicroBatch& out, const MicroBatch& in) {
  out.set_number(in.number);
  for (const MicroBatchSlice& slice : in.slices) {
    pb::MicroBatch::Slice* added = out.add_slices();
    added->set_request(slice.request);
    added->set_datum_begin(slice.datum_begin);
    added->set_datum_end(slice.datum_end);
  }
}

inline MicroBatch take(const pb::MicroBatch& in) {
  MicroBatch out;
  out.number = in.number();
  out.slices.reserve(static_cast<std::size_t>(in.slices_size()));
  for (const pb::MicroBatch::Slice& slice : in.slices()) {
    out.slices.push_back({slice.request(), slice.datum_begin(), slice.datum_end()});
  }
  return out;
}

}  // namespace ht::worker_protocol
