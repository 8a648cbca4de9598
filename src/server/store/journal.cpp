#include "server/store/journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <boost/crc.hpp>

#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

#include "base/error.h"

namespace ht::store {
namespace {

constexpr std::uint64_t kFileMagic = 0x314c4e524a5448ULL;  // "HTJRNL1"
constexpr std::uint32_t kRecordMagic = 0x72544824U;        // "$HTr"
constexpr std::size_t kFileHeader = 28;                    // magic, segment number, nonce, checksum
constexpr std::size_t kRecordHeader = 12;                  // magic, length, checksum

std::string reason() {
  return std::strerror(errno);
}

template <typename T>
T load(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}
template <typename T>
void store(char* at, T value) {
  std::memcpy(at, &value, sizeof(value));
}

std::uint32_t checksum(std::uint64_t nonce, std::uint64_t offset, std::string_view payload) {
  std::array<char, 20> prefix{};
  store(prefix.data(), nonce);
  store(prefix.data() + 8, offset);
  store(prefix.data() + 16, static_cast<std::uint32_t>(payload.size()));
  boost::crc_32_type crc;
  crc.process_bytes(prefix.data(), prefix.size());
  crc.process_bytes(payload.data(), payload.size());
  return crc.checksum();
}

std::uint32_t header_checksum(const char* header) {
  boost::crc_32_type crc;
  crc.process_bytes(header, kFileHeader - 4);
  return crc.checksum();
}

struct Fd {
  int value = -1;
  explicit Fd(int fd) : value(fd) {}
  ~Fd() {
    if (value >= 0) ::close(value);
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
};

// Reads up to `size` bytes at `offset`; fewer at the end of the file.
std::size_t read_at(int fd, char* to, std::size_t size, std::uint64_t offset, const std::filesystem::path& path) {
  std::size_t done = 0;
  while (done < size) {
    const ssize_t n = ::pread(fd, to + done, size - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw server_error("cannot read journal " + path.string() + ": " + reason());
    if (n == 0) break;
    done += static_cast<std::size_t>(n);
  }
  return done;
}

bool write_all(int fd, const char* from, std::size_t size) {
  while (size > 0) {
    const ssize_t n = ::write(fd, from, size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    from += n;
    size -= static_cast<std::size_t>(n);
  }
  return true;
}

std::string read_file(const std::filesystem::path& path) {
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat info {};
  if (fd.value < 0 || ::fstat(fd.value, &info) != 0) {
    throw server_error("cannot open journal " + path.string() + ": " + reason());
  }
  std::string bytes(static_cast<std::size_t>(info.st_size), '\0');
  bytes.resize(read_at(fd.value, bytes.data(), bytes.size(), 0, path));
  return bytes;
}

// The valid record at `offset` of a segment's bytes, or nothing.
std::optional<std::string_view> record_at(std::string_view file, std::uint64_t offset, std::uint64_t nonce) {
  if (file.size() - offset < kRecordHeader) return std::nullopt;
  const char* at = file.data() + offset;
  const auto length = load<std::uint32_t>(at + 4);
  if (load<std::uint32_t>(at) != kRecordMagic || length > file.size() - offset - kRecordHeader) return std::nullopt;
  const std::string_view payload = file.substr(offset + kRecordHeader, length);
  if (load<std::uint32_t>(at + 8) != checksum(nonce, offset, payload)) return std::nullopt;
  return payload;
}

// Is there a valid record anywhere behind `offset`? Then what lies at `offset` was damaged, not torn.
bool valid_record_behind(std::string_view file, std::uint64_t offset, std::uint64_t nonce) {
  std::array<char, 4> magic{};
  store(magic.data(), kRecordMagic);
  std::size_t at = offset;
  while ((at = file.find(std::string_view(magic.data(), 4), at + 1)) != std::string_view::npos) {
    if (record_at(file, at, nonce)) return true;
  }
  return false;
}

}  // namespace

void sync_path(const std::filesystem::path& path) {
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.value < 0 || ::fsync(fd.value) != 0) throw server_error("cannot sync " + path.string() + ": " + reason());
}

Journal::Journal(JournalOptions options) : options_(std::move(options)) {
  std::filesystem::create_directories(options_.dir);
  lock_fd_ = ::open((options_.dir / "lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_fd_ < 0 || ::flock(lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    const std::string why = reason();
    if (lock_fd_ >= 0) ::close(lock_fd_);
    throw server_error("journal " + options_.dir.string() + " is in use by another server (" + why + ")");
  }
  try {
    check_segments();
  } catch (...) {
    if (fd_ >= 0) ::close(fd_);
    ::close(lock_fd_);
    throw;
  }
}

Journal::~Journal() {
  if (fd_ >= 0) ::close(fd_);
  if (lock_fd_ >= 0) ::close(lock_fd_);
}

std::filesystem::path Journal::path_of(std::uint64_t segment) const {
  std::string number = std::to_string(segment);
  return options_.dir / (std::string(number.size() < 10 ? 10 - number.size() : 0, '0') + number + ".journal");
}

void Journal::check_segments() {
  std::uint64_t low = UINT64_MAX, high = 0, count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(options_.dir)) {
    if (entry.path().extension() != ".journal") continue;
    const std::string stem = entry.path().stem().string();
    std::uint64_t number = 0;
    const auto parsed = std::from_chars(stem.data(), stem.data() + stem.size(), number);
    if (parsed.ec != std::errc() || parsed.ptr != stem.data() + stem.size() || number == 0) {
      throw server_error("journal " + options_.dir.string() + ": " + entry.path().filename().string() +
                         " is no segment's name");
    }
    low = std::min(low, number);
    high = std::max(high, number);
    ++count;
  }
  if (count == 0) return open_segment(1);
  if (high - low + 1 != count) {
    throw server_error("journal " + options_.dir.string() + ": segments are missing between " + std::to_string(low) +
                       " and " + std::to_string(high));
  }
  first_ = low;
  // A process that died while it made a segment leaves one without a whole header.
  if (std::filesystem::file_size(path_of(high)) < kFileHeader) {
    torn_bytes_ = std::filesystem::file_size(path_of(high));
    std::filesystem::remove(path_of(high));
    if (high == low) return open_segment(high);
    --high;
  }
  std::uint64_t end = 0;
  for (std::uint64_t segment = low; segment <= high; ++segment) end = scan(segment, segment == high, {});
  const std::uint64_t size = std::filesystem::file_size(path_of(high));
  torn_bytes_ += size - end;
  if (size != end) std::filesystem::resize_file(path_of(high), end);
  fd_ = ::open(path_of(high).c_str(), O_RDWR | O_APPEND | O_CLOEXEC);
  std::array<char, kFileHeader> header{};
  if (fd_ < 0 || read_at(fd_, header.data(), header.size(), 0, path_of(high)) != kFileHeader) {
    throw server_error("cannot open journal " + path_of(high).string() + ": " + reason());
  }
  current_ = high;
  size_ = end;
  nonce_ = load<std::uint64_t>(header.data() + 16);
}

void Journal::open_segment(std::uint64_t segment) {
  const auto path = path_of(segment);
  std::random_device random;
  std::array<char, kFileHeader> header{};
  const std::uint64_t nonce = (std::uint64_t{random()} << 32) | random();
  store(header.data(), kFileMagic);
  store(header.data() + 8, segment);
  store(header.data() + 16, nonce);
  store(header.data() + 24, header_checksum(header.data()));
  const int fd = ::open(path.c_str(), O_RDWR | O_APPEND | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0 || !write_all(fd, header.data(), header.size())) {
    const std::string why = reason();
    if (fd >= 0) ::close(fd);
    ::unlink(path.c_str());
    throw server_error("cannot make journal segment " + path.string() + ": " + why);
  }
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
  current_ = segment;
  size_ = kFileHeader;
  nonce_ = nonce;
  if (options_.durability == Durability::power) sync_path(options_.dir);
}

RecordPosition Journal::append(std::string_view payload) {
  if (payload.size() > options_.max_record_bytes) {
    throw server_error("a journal record of " + std::to_string(payload.size()) + " bytes: at most " +
                       std::to_string(options_.max_record_bytes) + " are allowed");
  }
  if (broken_) {
    if (::ftruncate(fd_, static_cast<off_t>(size_)) != 0)
      throw server_error("the journal cannot be written: " + reason());
    broken_ = false;
  }
  if (size_ >= options_.segment_bytes && size_ > kFileHeader) open_segment(current_ + 1);
  std::string record(kRecordHeader, '\0');
  record.reserve(kRecordHeader + payload.size());
  store(record.data(), kRecordMagic);
  store(record.data() + 4, static_cast<std::uint32_t>(payload.size()));
  store(record.data() + 8, checksum(nonce_, size_, payload));
  record.append(payload);
  const bool written = write_all(fd_, record.data(), record.size()) &&
                       (options_.durability == Durability::process || ::fdatasync(fd_) == 0);
  if (!written) {
    const std::string why = reason();
    broken_ = ::ftruncate(fd_, static_cast<off_t>(size_)) != 0;
    throw server_error("the journal cannot be written (" + path_of(current_).string() + "): " + why);
  }
  const RecordPosition position{current_, size_, static_cast<std::uint32_t>(payload.size())};
  size_ += record.size();
  return position;
}

std::uint64_t Journal::scan(std::uint64_t segment, bool last,
                            const std::function<void(const RecordPosition&, std::string_view)>& visit) const {
  const auto path = path_of(segment);
  const std::string bytes = read_file(path);
  const std::string_view file = bytes;
  if (file.size() < kFileHeader || load<std::uint64_t>(file.data()) != kFileMagic ||
      load<std::uint64_t>(file.data() + 8) != segment ||
      load<std::uint32_t>(file.data() + 24) != header_checksum(file.data())) {
    throw server_error("journal " + path.string() + " is damaged at offset 0: not the header of segment " +
                       std::to_string(segment));
  }
  const auto nonce = load<std::uint64_t>(file.data() + 16);
  std::uint64_t offset = kFileHeader;
  while (offset < file.size()) {
    const auto payload = record_at(file, offset, nonce);
    if (!payload) {
      if (last && !valid_record_behind(file, offset, nonce)) break;
      throw server_error("journal " + path.string() + " is damaged at offset " + std::to_string(offset) +
                         ": the record's checksum is wrong and more records follow it");
    }
    if (visit) visit({segment, offset, static_cast<std::uint32_t>(payload->size())}, *payload);
    offset += kRecordHeader + payload->size();
  }
  return offset;
}

void Journal::replay(const std::function<void(const RecordPosition&, std::string_view)>& visit) const {
  for (std::uint64_t segment = first_; segment <= current_; ++segment) scan(segment, segment == current_, visit);
}

std::string Journal::read(const RecordPosition& position) const {
  const auto path = path_of(position.segment);
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.value < 0) throw server_error("cannot open journal " + path.string() + ": " + reason());
  std::array<char, kFileHeader> header{};
  std::string record(kRecordHeader + position.length, '\0');
  if (read_at(fd.value, header.data(), header.size(), 0, path) != header.size() ||
      read_at(fd.value, record.data(), record.size(), position.offset, path) != record.size() ||
      load<std::uint32_t>(record.data()) != kRecordMagic || load<std::uint32_t>(record.data() + 4) != position.length ||
      load<std::uint32_t>(record.data() + 8) != checksum(load<std::uint64_t>(header.data() + 16), position.offset,
                                                         std::string_view(record).substr(kRecordHeader))) {
    throw server_error("journal " + path.string() + " is damaged at offset " + std::to_string(position.offset));
  }
  record.erase(0, kRecordHeader);
  return record;
}

std::uint64_t Journal::bytes() const {
  std::uint64_t total = 0;
  for (std::uint64_t segment = first_; segment < current_; ++segment)
    total += std::filesystem::file_size(path_of(segment));
  return total + size_;
}

void Journal::drop_before(std::uint64_t segment) {
  for (; first_ < std::min(segment, current_); ++first_) std::filesystem::remove(path_of(first_));
}

}  // namespace ht::store
