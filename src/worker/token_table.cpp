#include "worker/token_table.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#include "base/error.h"

namespace ht::worker {

namespace {

constexpr std::uint32_t kMaxVocab = 1u << 24;

std::uint32_t read_u32(const std::string& bytes, std::size_t at) {
  std::uint32_t value = 0;
  for (int i = 3; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(bytes[at + static_cast<std::size_t>(i)]);
  return value;
}

}  // namespace

TokenTable TokenTable::read(const std::filesystem::path& file) {
  const auto refuse = [&file](const std::string& what) {
    return user_error("token table " + file.string() + ": " + what);
  };
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw refuse("the file cannot be opened");
  const std::string bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (bytes.size() < 12 || bytes.compare(0, 4, "HTTT") != 0) throw refuse("it does not begin with HTTT");
  if (const std::uint32_t version = read_u32(bytes, 4); version != 1) {
    throw refuse("version " + std::to_string(version) + ", this worker reads version 1");
  }
  const std::uint32_t vocab = read_u32(bytes, 8);
  if (vocab > kMaxVocab) throw refuse(std::to_string(vocab) + " tokens, at most " + std::to_string(kMaxVocab));
  TokenTable table;
  table.offsets_.push_back(0);
  std::size_t at = 12;
  for (std::uint32_t token = 0; token < vocab; ++token) {
    if (bytes.size() - at < 5) throw refuse("it ends inside token " + std::to_string(token));
    const std::uint32_t length = read_u32(bytes, at + 1);
    at += 5;
    if (bytes.size() - at < length) throw refuse("it ends inside token " + std::to_string(token));
    table.text_.insert(table.text_.end(), bytes.begin() + static_cast<std::ptrdiff_t>(at),
                       bytes.begin() + static_cast<std::ptrdiff_t>(at + length));
    table.offsets_.push_back(table.text_.size());
    at += length;
  }
  if (at != bytes.size()) throw refuse(std::to_string(bytes.size() - at) + " bytes follow the last token");
  return table;
}

std::string_view TokenTable::bytes(std::int32_t token) const {
  if (token < 0 || token >= size()) return {};
  const auto index = static_cast<std::size_t>(token);
  return {text_.data() + offsets_[index], offsets_[index + 1] - offsets_[index]};
}

}  // namespace ht::worker
