#pragma once

#include <cstdint>
#include <filesystem>
#include <string_view>
#include <vector>

namespace ht::worker {

// The bytes of every token, as the tokenizer helper exports them once per tokenizer. The file, all integers
// little-endian, without padding:
//
//   bytes 0…3     "HTTT"
//   u32           version, 1
//   u32           vocab: number of entries, token ids 0 … vocab - 1
//   vocab times:  u8 special (1: a special token, 0: an ordinary one), u32 length, `length` bytes
//
// and nothing after the last entry. The bytes of an ordinary token are what it adds to the decoded text in the middle
// of a sequence (byte-level alphabets mapped back to bytes, SentencePiece byte fallback resolved, U+2581 as a space),
// so they need not be whole UTF-8 characters. The bytes of a special token are its written form ("<|im_end|>"). An id
// that the tokenizer does not have is special with length 0.
class TokenTable {
 public:
  // Throws Error(user) naming the file and what is wrong with it.
  static TokenTable read(const std::filesystem::path& file);

  // Empty for an id outside the table.
  std::string_view bytes(std::int32_t token) const;
  std::int32_t size() const { return static_cast<std::int32_t>(offsets_.size()) - 1; }

 private:
  std::vector<char> text_;
  std::vector<std::uint64_t> offsets_;  // [size + 1]
};

}  // namespace ht::worker
