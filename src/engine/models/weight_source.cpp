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

// Of a float32 slice on its way to a device.
constexpr std::int64_t kSliceElements = 16 << 20;

// Hands the file's pages back: they would count as ours until the load is over.
void release_pages(const safetensors::TensorView& view) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(view.data) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(view.data) + view.bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace

WeightSource::WeightSource(const Device& device, const std::filesystem::path& dir, std::int64_t total_elements,
                           Progress progress)
    : device_(device),
      dir_(dir.string()),
      checkpoint_(safetensors::Checkpoint::open_directory(dir)),
      total_elements_(total_elements),
      progress_(std::move(progress)) {}

// `out`: the tensor's rows of the result, contiguous.
void WeightSource::read_into(const model_spec::BaseTensor& tensor, const at::Tensor& out) {
  const auto& [name, shape] = tensor;
  const safetensors::TensorView& view = checkpoint_.at(name);
  if (view.shape != shape) {
    throw user_error("tensor " + name + " in " + dir_ + " has the shape " + shape_text(view.shape) +
                     ", config.json asks for " + shape_text(shape));
  }
  const std::int64_t rows = shape[0];
  const std::int64_t columns = shape.size() > 1 ? shape[1] : 1;
  if (shape.size() == 1) {
    const at::Tensor values = at::empty({rows}, at::kFloat);
    safetensors::read_rows_f32(view, 0, rows, values.data_ptr<float>());
    out.copy_(values);
  } else {
    const bool in_place = out.is_cpu() && out.scalar_type() == at::kFloat;
    const std::int64_t slice_rows =
        in_place ? rows : std::min(rows, std::max<std::int64_t>(1, kSliceElements / columns));
    const at::Tensor slice = in_place ? out : at::empty({slice_rows, columns}, at::kFloat);
    const std::int64_t grain = std::max<std::int64_t>(1, (1 << 18) / columns);
    for (std::int64_t first = 0; first < rows; first += slice_rows) {
      const std::int64_t count = std::min(slice_rows, rows - first);
      at::parallel_for(0, count, grain, [&, to = slice.data_ptr<float>()](std::int64_t begin, std::int64_t end) {
        safetensors::read_rows_f32(view, first + begin, first + end, to + begin * columns);
      });
      // Rounded on this side: half as much crosses to the device.
      if (!in_place) out.narrow(0, first, count).copy_(slice.narrow(0, 0, count).to(out.scalar_type()));
    }
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
  const at::Tensor result = at::empty(shape, device_.options());
  std::int64_t row = 0;
  for (const model_spec::BaseTensor& tensor : tensors) {
    read_into(tensor, result.narrow(0, row, tensor.shape[0]));
    row += tensor.shape[0];
  }
  return result;
}

}  // namespace ht::engine
