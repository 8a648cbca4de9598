#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>
#include <unordered_map>

#include "base/error.h"
#include "safetensors/safetensors.h"

namespace ht::safetensors {
namespace {

namespace fs = std::filesystem;
namespace json = boost::json;

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr std::size_t kMaxDimensions = 8;

struct DTypeRow {
  DType dtype;
  std::string_view name;
  std::size_t size;
};
constexpr DTypeRow kDTypes[] = {{DType::f64, "F64", 8},   {DType::f32, "F32", 4}, {DType::f16, "F16", 2},
                                {DType::bf16, "BF16", 2}, {DType::i64, "I64", 8}, {DType::i32, "I32", 4},
                                {DType::u8, "U8", 1}};

class Mapping {
 public:
  explicit Mapping(const fs::path& file) {
    const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw user_error("cannot open " + file.string() + ": " + std::strerror(errno));
    struct stat info {};
    if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
      ::close(fd);
      throw user_error(file.string() + " is no regular file");
    }
    size_ = static_cast<std::size_t>(info.st_size);
    void* address = size_ == 0 ? nullptr : ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    const int error = errno;
    ::close(fd);
    if (address == MAP_FAILED) throw server_error("cannot map " + file.string() + ": " + std::strerror(error));
    data_ = static_cast<const std::byte*>(address);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  }
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

[[noreturn]] void bad(const fs::path& file, const std::string& what) {
  throw user_error(file.string() + ": " + what);
}

std::uint64_t non_negative(const json::value& value, const fs::path& file, const std::string& what) {
  if (value.is_int64() && value.get_int64() >= 0) return static_cast<std::uint64_t>(value.get_int64());
  if (value.is_uint64()) return value.get_uint64();
  bad(file, what + " must be a non-negative integer, it is " + json::serialize(value));
}

const json::value& field(const json::object& object, std::string_view key, const fs::path& file,
                         const std::string& tensor) {
  const json::value* value = object.if_contains(key);
  if (value == nullptr) bad(file, "tensor \"" + tensor + "\" has no " + std::string(key));
  return *value;
}

// One entry of the header, checked against the size of the data section.
TensorView parse_tensor(const fs::path& file, const std::string& name, const json::value& entry,
                        const std::byte* section, std::uint64_t section_size) {
  if (!entry.is_object()) bad(file, "tensor \"" + name + "\" is not described by an object");
  const json::object& object = entry.get_object();
  TensorView view;

  const json::value& dtype = field(object, "dtype", file, name);
  const auto row = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                [&](const DTypeRow& r) { return dtype.is_string() && dtype.get_string() == r.name; });
  if (row == std::end(kDTypes)) {
    bad(file, "tensor \"" + name + "\" has dtype " + json::serialize(dtype) +
                  "; supported: F64, F32, F16, BF16, I64, I32, U8");
  }
  view.dtype = row->dtype;

  const json::value& shape = field(object, "shape", file, name);
  if (!shape.is_array() || shape.get_array().size() > kMaxDimensions) {
    bad(file, "tensor \"" + name + "\" must have a shape of at most " + std::to_string(kMaxDimensions) + " dimensions");
  }
  std::uint64_t bytes = row->size;
  for (const json::value& dimension : shape.get_array()) {
    const std::uint64_t n = non_negative(dimension, file, "a dimension of tensor \"" + name + "\"");
    if (n > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()) ||
        __builtin_mul_overflow(bytes, n, &bytes)) {
      bad(file, "tensor \"" + name + "\" has a shape too large to be true: " + json::serialize(shape));
    }
    view.shape.push_back(static_cast<std::int64_t>(n));
  }

  const json::value& offsets = field(object, "data_offsets", file, name);
  if (!offsets.is_array() || offsets.get_array().size() != 2) {
    bad(file, "tensor \"" + name + "\" must have two data_offsets");
  }
  const std::uint64_t begin = non_negative(offsets.get_array()[0], file, "data_offsets of tensor \"" + name + "\"");
  const std::uint64_t end = non_negative(offsets.get_array()[1], file, "data_offsets of tensor \"" + name + "\"");
  if (begin > end || end > section_size) {
    bad(file, "tensor \"" + name + "\" lies at [" + std::to_string(begin) + ", " + std::to_string(end) +
                  ") but the file holds " + std::to_string(section_size) + " bytes of data (is it truncated?)");
  }
  if (end - begin != bytes) {
    bad(file, "tensor \"" + name + "\" has " + std::to_string(end - begin) + " bytes, its shape and dtype need " +
                  std::to_string(bytes));
  }
  view.data = section + begin;
  view.bytes = static_cast<std::size_t>(bytes);
  return view;
}

struct Extent {
  const std::byte* begin;
  const std::byte* end;
  std::string name;
};

void check_overlaps(const fs::path& file, std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < extents.size(); ++i) {
    if (extents[i - 1].end > extents[i].begin) {
      bad(file, "tensors \"" + extents[i - 1].name + "\" and \"" + extents[i].name + "\" overlap");
    }
  }
}

}  // namespace

std::size_t size_of(DType dtype) {
  return kDTypes[static_cast<std::size_t>(dtype)].size;
}
std::string_view name_of(DType dtype) {
  return kDTypes[static_cast<std::size_t>(dtype)].name;
}

struct Checkpoint::Impl {
  fs::path origin;
  std::vector<std::unique_ptr<Mapping>> mappings;
  std::unordered_map<std::string, TensorView> tensors;
  std::map<std::string, std::string> metadata;

  // Adds the tensors of one file; `wanted` (null: all) names those that an index assigns to it.
  void add_file(const fs::path& file, const std::set<std::string>* wanted) {
    auto mapping = std::make_unique<Mapping>(file);
    std::uint64_t header_size = 0;
    if (mapping->size() < 8)
      bad(file, "is no safetensors file: it has only " + std::to_string(mapping->size()) + " bytes");
    std::memcpy(&header_size, mapping->data(), 8);
    if (header_size > kMaxHeaderBytes || header_size > mapping->size() - 8) {
      bad(file, "is no safetensors file: a header of " + std::to_string(header_size) + " bytes does not fit");
    }
    const std::string_view text(reinterpret_cast<const char*>(mapping->data()) + 8,
                                static_cast<std::size_t>(header_size));
    json::error_code error;
    const json::value header = json::parse(text, error);
    if (error || !header.is_object()) bad(file, "has a header that is no JSON object");

    metadata.clear();
    const std::byte* section = mapping->data() + 8 + header_size;
    const std::uint64_t section_size = mapping->size() - 8 - header_size;
    std::vector<Extent> extents;
    for (const auto& [key, value] : header.get_object()) {
      const std::string name(key);
      if (name == "__metadata__") {
        if (!value.is_object()) bad(file, "__metadata__ must be an object");
        for (const auto& [meta_key, meta_value] : value.get_object()) {
          if (!meta_value.is_string()) bad(file, "__metadata__ must map strings to strings");
          metadata[std::string(meta_key)] = std::string(meta_value.get_string());
        }
        continue;
      }
      const TensorView view = parse_tensor(file, name, value, section, section_size);
      if (view.bytes > 0) extents.push_back({view.data, view.data + view.bytes, name});
      if (wanted != nullptr && !wanted->contains(name)) continue;
      if (!tensors.emplace(name, view).second) bad(file, "tensor \"" + name + "\" appears twice");
    }
    check_overlaps(file, extents);
    if (wanted != nullptr) {
      for (const std::string& name : *wanted) {
        if (!tensors.contains(name)) bad(file, "lacks tensor \"" + name + "\" that the index assigns to it");
      }
    }
    mappings.push_back(std::move(mapping));
  }
};

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

Checkpoint Checkpoint::open_file(const fs::path& file) {
  auto impl = std::make_unique<Impl>();
  impl->origin = file;
  impl->add_file(file, nullptr);
  return Checkpoint(std::move(impl));
}

Checkpoint Checkpoint::open_directory(const fs::path& dir) {
  auto impl = std::make_unique<Impl>();
  impl->origin = dir;
  const fs::path single = dir / "model.safetensors";
  const fs::path index = dir / "model.safetensors.index.json";
  if (!fs::exists(index)) {
    if (!fs::exists(single)) {
      throw user_error(dir.string() + " has neither model.safetensors nor model.safetensors.index.json");
    }
    impl->add_file(single, nullptr);
    return Checkpoint(std::move(impl));
  }

  std::ifstream stream(index, std::ios::binary);
  std::ostringstream text;
  text << stream.rdbuf();
  json::error_code error;
  const json::value parsed = json::parse(text.str(), error);
  const json::value* map = error || !parsed.is_object() ? nullptr : parsed.get_object().if_contains("weight_map");
  if (map == nullptr || !map->is_object()) bad(index, "has no weight_map object");
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [tensor, shard] : map->get_object()) {
    if (!shard.is_string()) bad(index, "tensor \"" + std::string(tensor) + "\" is assigned to no file name");
    const std::string file(shard.get_string());
    // A shard lies beside its index: no path can lead elsewhere.
    if (file.empty() || file.front() == '.' || file.find('/') != std::string::npos) {
      bad(index, "\"" + file + "\" is no file name");
    }
    shards[file].insert(std::string(tensor));
  }
  for (const auto& [file, names] : shards) impl->add_file(dir / file, &names);
  return Checkpoint(std::move(impl));
}

bool Checkpoint::contains(const std::string& name) const {
  return impl_->tensors.contains(name);
}

const TensorView& Checkpoint::at(const std::string& name) const {
  const auto found = impl_->tensors.find(name);
  if (found == impl_->tensors.end()) throw user_error(impl_->origin.string() + " lacks tensor \"" + name + "\"");
  return found->second;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(impl_->tensors.size());
  for (const auto& [name, view] : impl_->tensors) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

const std::map<std::string, std::string>& Checkpoint::metadata() const {
  return impl_->metadata;
}

}  // namespace ht::safetensors
