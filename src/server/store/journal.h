#pragma once

// The append-only journal: checksummed records in numbered segment files. What a record means is its writer's business.
//
// A segment begins with a header (magic, its number, a random nonce, crc32). A record is {magic u32, length u32, crc32
// u32, bytes}, little-endian; the checksum covers the segment's nonce, the record's offset, its length and its bytes,
// so that no bytes inside a payload can pass for a record.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

namespace ht::store {

enum class Durability {
  process,  // write(2): survives the death of any process
  power,    // and fdatasync(2): survives the loss of power
};

struct JournalOptions {
  std::filesystem::path dir;  // made if absent
  std::uint64_t segment_bytes = std::uint64_t{64} << 20;
  std::size_t max_record_bytes = std::size_t{1} << 30;
  Durability durability = Durability::process;
};

// Where a record lies.
struct RecordPosition {
  std::uint64_t segment = 0;
  std::uint64_t offset = 0;
  std::uint32_t length = 0;  // of the payload

  friend bool operator==(const RecordPosition&, const RecordPosition&) = default;
};

// fsync of a file or a directory. Throws Error(server).
void sync_path(const std::filesystem::path& path);

class Journal {
 public:
  // Checks every record. A torn tail (an incomplete last record, and nothing valid behind it) is cut off. Throws
  // Error(server) naming file and offset for damage anywhere else, and when another process has the journal open.
  explicit Journal(JournalOptions options);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  // The record is in the file when this returns. Throws Error(server) when it could not be written (disk full): nothing
  // of it remains then.
  RecordPosition append(std::string_view payload);

  // Every record, oldest first.
  void replay(const std::function<void(const RecordPosition&, std::string_view payload)>& visit) const;
  // One record again, its checksum verified. Throws Error(server).
  std::string read(const RecordPosition& position) const;

  const JournalOptions& options() const { return options_; }
  std::uint64_t first_segment() const { return first_; }
  std::uint64_t current_segment() const { return current_; }
  std::uint64_t bytes() const;                              // of all segments
  std::uint64_t torn_bytes() const { return torn_bytes_; }  // cut off by the constructor
  // Deletes segments with a number below `segment` (never the current one).
  void drop_before(std::uint64_t segment);

 private:
  std::filesystem::path path_of(std::uint64_t segment) const;
  void open_segment(std::uint64_t segment);
  void check_segments();
  std::uint64_t scan(std::uint64_t segment, bool last,
                     const std::function<void(const RecordPosition&, std::string_view)>& visit) const;

  JournalOptions options_;
  int lock_fd_ = -1;
  int fd_ = -1;  // of the current segment
  std::uint64_t first_ = 1;
  std::uint64_t current_ = 0;
  std::uint64_t size_ = 0;  // of the current segment
  std::uint64_t nonce_ = 0;
  std::uint64_t torn_bytes_ = 0;
  bool broken_ = false;  // a failed append could not be undone
};

}  // namespace ht::store
