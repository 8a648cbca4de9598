#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ht::safetensors {

enum class DType { f64, f32, f16, bf16, i64, i32, u8 };
std::size_t size_of(DType dtype);
std::string_view name_of(DType dtype);  // "F32"

// A tensor inside a mapped file: valid while its Checkpoint lives. Alignment is not guaranteed.
struct TensorView {
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;
  std::size_t bytes = 0;
};

// All tensors of a directory's model.safetensors or of the shards named by model.safetensors.index.json, mapped
// read-only; or of one named file. Headers are validated: bounds, sizes, overlaps. Throws Error(user) naming file and
// tensor.
class Checkpoint {
 public:
  static Checkpoint open_directory(const std::filesystem::path& dir);
  static Checkpoint open_file(const std::filesystem::path& file);

  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  bool contains(const std::string& name) const;
  // Throws Error(user) naming the tensor and the directory when it is missing.
  const TensorView& at(const std::string& name) const;
  std::vector<std::string> names() const;
  const std::map<std::string, std::string>& metadata() const;  // __metadata__ of the (last) file

 private:
  struct Impl;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Converts rows [row_begin, row_end) of a 2-D (or all of a 1-D) tensor to float32. `out` has room for them.
// bf16, f16, f32 and f64 are accepted; others throw Error(user).
void read_rows_f32(const TensorView& view, std::int64_t row_begin, std::int64_t row_end, float* out);

// A tensor to write: the data must live until write() returns.
struct TensorToWrite {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  const void* data = nullptr;
};

// Writes `file` atomically: temporary file in the same directory, fsync, rename.
void write_file(const std::filesystem::path& file, const std::vector<TensorToWrite>& tensors,
                const std::map<std::string, std::string>& metadata = {});

}  // namespace ht::safetensors
