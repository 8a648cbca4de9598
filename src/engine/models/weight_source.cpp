#include "engine/models/weight_source.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "base/error.h"

namespace ht::engine {

namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Hands the file's pages back: they would count as ours until the load is over.
void release_pages(const safetensors::TensorView& view) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(view.data) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(view.data) + view.bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace

WeightSource::WeightSource(const std::filesystem::path& dir, std::int64_t total_elements, Progress progress)
    : dir_(dir.string()),
      checkpoint_(safetensors::Checkpoint::open_directory(dir)),
      total_elements_(total_elements),
      progress_(std::move(progress)) {}

void WeightSource::read_into(const model_spec::BaseTensor& tensor, float* out) {
  const auto& [name, shape] = tensor;
  const safetensors::TensorView& view = checkpoint_.at(name);
  if (view.shape != shape) {
    throw user_error("tensor " + name + " in " + dir_ + " has the shape " + shape_text(view.shape) +
                     ", config.json asks for " + shape_text(shape));
  }
  const std::int64_t rows = shape[0];
  const std::int64_t columns = shape.size() > 1 ? shape[1] : 1;
  if (shape.size() == 1) {
    safetensors::read_rows_f32(view, 0, rows, out);
  } else {
    const std::int64_t grain = std::max<std::int64_t>(1, (1 << 18) / columns);
    at::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) {
      safetensors::read_rows_f32(view, begin, end, out + begin * columns);
    });
  }
  release_pages(view);
  done_elements_ += rows * columns;
  if (progress_) {
    progress_(std::min(1.0, static_cast<double>(done_elements_) / static_cast<double>(total_elements_)), name);
  }
}

at::Tensor WeightSource::read(const std::vector<model_spec::BaseTensor>& tensors) {
  std::vector<std::int64_t> shape = tensors.front().shape;
  for (std::size_t i = 1; i < tensors.size(); ++i) shape[0] += tensors[i].shape[0];
  at::Tensor result = at::empty(shape, at::kFloat);
  float* out = result.data_ptr<float>();
  for (const model_spec::BaseTensor& tensor : tensors) {
    read_into(tensor, out);
    out += tensor.shape[0] * (tensor.shape.size() > 1 ? tensor.shape[1] : 1);
  }
  return result;
}

}  // namespace ht::engine
