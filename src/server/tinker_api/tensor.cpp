#include "server/tinker_api/tensor.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace ht::tinker_api {
namespace {

static_assert(std::endian::native == std::endian::little, "the wire's tensors are little-endian");

std::int64_t element_size(tinker_public::DType dtype) {
  switch (dtype) {
    case tinker_public::DTYPE_FLOAT32:
    case tinker_public::DTYPE_INT32:
      return 4;
    case tinker_public::DTYPE_INT64:
      return 8;
    case tinker_public::DTYPE_BFLOAT16:
      return 2;
    default:
      return 0;
  }
}

template <typename T>
T load(std::string_view bytes, std::int64_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

float bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::int64_t column(const TensorView& tensor, std::int64_t row, std::int64_t index) {
  return row * tensor.cols + load<std::int64_t>(tensor.col_indices, index);
}

// Calls store(cell, value) for each stored value, converted by `read` from its place.
template <typename Read, typename Store>
void for_each_value(const TensorView& tensor, Read read, Store store) {
  if (!tensor.sparse) {
    for (std::int64_t i = 0, n = tensor.cells(); i < n; ++i) store(i, read(i));
    return;
  }
  for (std::int64_t row = 0; row < tensor.rows; ++row) {
    const auto end = load<std::int64_t>(tensor.crow_indices, row + 1);
    for (auto i = load<std::int64_t>(tensor.crow_indices, row); i < end; ++i) store(column(tensor, row, i), read(i));
  }
}

std::string position(const TensorView& tensor, std::int64_t cell) {
  if (tensor.cols < 0) return "[" + std::to_string(cell) + "]";
  return "[" + std::to_string(cell / tensor.cols) + ", " + std::to_string(cell % tensor.cols) + "]";
}

void view_csr(const tinker_public::SparseCsr& csr, TensorView& view) {
  if (view.cols < 0) {
    throw user_error(view.name + ": a sparse CSR tensor needs a shape of two dimensions, got " + view.shape());
  }
  view.sparse = true;
  view.values = csr.values();
  view.crow_indices = csr.crow_indices();
  view.col_indices = csr.col_indices();
  if (view.crow_indices.size() % 8 != 0 || view.col_indices.size() % 8 != 0) {
    throw user_error(view.name + ": CSR indices must be int64 (8 bytes each), got " +
                     std::to_string(view.crow_indices.size()) + " and " + std::to_string(view.col_indices.size()) +
                     " bytes");
  }
  const std::int64_t size = element_size(view.dtype);
  if (static_cast<std::int64_t>(view.values.size()) != static_cast<std::int64_t>(view.col_indices.size()) / 8 * size) {
    throw user_error(view.name + ": CSR has " + std::to_string(view.values.size()) + " bytes of values of " +
                     std::to_string(size) + " bytes for " + std::to_string(view.col_indices.size() / 8) +
                     " column indices");
  }
  std::vector<std::int64_t> crow(view.crow_indices.size() / 8), col(view.col_indices.size() / 8);
  if (!crow.empty()) std::memcpy(crow.data(), view.crow_indices.data(), view.crow_indices.size());
  if (!col.empty()) std::memcpy(col.data(), view.col_indices.data(), view.col_indices.size());
  check_csr(view.name, view.rows, view.cols, static_cast<std::int64_t>(col.size()), crow, col);
}

}  // namespace

std::string TensorView::shape() const {
  std::string text = "(" + std::to_string(rows);
  if (cols >= 0) text += ", " + std::to_string(cols);
  return text + ")";
}

void check_csr(const std::string& name, std::int64_t rows, std::int64_t cols, std::int64_t num_values,
               std::span<const std::int64_t> crow, std::span<const std::int64_t> col) {
  if (static_cast<std::int64_t>(crow.size()) != rows + 1 || static_cast<std::int64_t>(col.size()) != num_values) {
    throw user_error(name + ": a CSR tensor of " + std::to_string(rows) + " rows and " + std::to_string(num_values) +
                     " values needs " + std::to_string(rows + 1) +
                     " row pointers and as many column indices as values; got " + std::to_string(crow.size()) +
                     " and " + std::to_string(col.size()));
  }
  if (crow.front() != 0 || crow.back() != num_values) {
    throw user_error(name + ": CSR row pointers must go from 0 to the number of values, " + std::to_string(num_values) +
                     "; got " + std::to_string(crow.front()) + " to " + std::to_string(crow.back()));
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    // Bounded by the ends only if each step is: a pointer may not leave [0, num_values] in between.
    if (crow[row + 1] < crow[row] || crow[row + 1] > num_values) {
      throw user_error(name + ": CSR row pointer " + std::to_string(crow[row + 1]) + " of row " + std::to_string(row) +
                       " must lie between " + std::to_string(crow[row]) + " and " + std::to_string(num_values));
    }
    for (std::int64_t i = crow[row]; i < crow[row + 1]; ++i) {
      if (col[i] < 0 || col[i] >= cols) {
        throw user_error(name + ": CSR column index " + std::to_string(col[i]) + " in row " + std::to_string(row) +
                         " is outside [0, " + std::to_string(cols) + ")");
      }
      if (i > crow[row] && col[i] <= col[i - 1]) {
        throw user_error(name + ": CSR column indices must ascend within a row; row " + std::to_string(row) + " has " +
                         std::to_string(col[i - 1]) + " before " + std::to_string(col[i]));
      }
    }
  }
}

TensorView view_tensor(const tinker_public::Tensor& tensor, std::string name, std::int64_t max_cells) {
  TensorView view;
  view.name = std::move(name);
  view.dtype = tensor.dtype();
  const std::int64_t size = element_size(view.dtype);
  if (size == 0) {
    throw user_error(view.name + ": dtype " + std::to_string(static_cast<int>(view.dtype)) +
                     " is unknown; allowed: float32 (1), int64 (2), int32 (3), bfloat16 (4)");
  }
  if (tensor.shape_size() > 2) {
    throw user_error(view.name + ": has " + std::to_string(tensor.shape_size()) + " dimensions; allowed: 1 or 2");
  }
  for (const std::int64_t extent : tensor.shape()) {
    if (extent < 0 || extent > max_cells) {
      throw user_error(view.name + ": extent " + std::to_string(extent) + " of its shape is outside [0, " +
                       std::to_string(max_cells) + "]");
    }
  }
  if (tensor.shape_size() >= 1) view.rows = tensor.shape(0);
  if (tensor.shape_size() == 2) view.cols = tensor.shape(1);
  // Both extents are at most max_cells (far below 2^31), so the product cannot overflow.
  if (view.cells() > max_cells) {
    throw user_error(view.name + ": shape " + view.shape() + " has " + std::to_string(view.cells()) +
                     " cells; at most " + std::to_string(max_cells) + " are allowed");
  }
  if (tensor.has_sparse_csr()) {
    view_csr(tensor.sparse_csr(), view);
    return view;
  }
  view.values = tensor.dense();
  const auto bytes = static_cast<std::int64_t>(view.values.size());
  if (tensor.shape_size() == 0) {
    if (bytes % size != 0) {
      throw user_error(view.name + ": " + std::to_string(bytes) + " bytes are no whole number of elements of " +
                       std::to_string(size) + " bytes");
    }
    view.rows = bytes / size;
    return view;
  }
  if (bytes != view.cells() * size) {
    throw user_error(view.name + ": shape " + view.shape() + " needs " + std::to_string(view.cells() * size) +
                     " bytes, got " + std::to_string(bytes));
  }
  return view;
}

void append_tokens(const TensorView& tensor, std::int64_t vocab_size, std::vector<std::int32_t>& out) {
  const std::size_t base = out.size();
  out.resize(base + static_cast<std::size_t>(tensor.cells()), 0);
  const auto store = [&](std::int64_t cell, auto value) {
    // Written so that NaN fails too.
    if (!(value >= 0 && value < static_cast<decltype(value)>(vocab_size))) {
      throw user_error(tensor.name + position(tensor, cell) + " = " + std::to_string(value) +
                       " is no token: the vocabulary is [0, " + std::to_string(vocab_size) + ")");
    }
    out[base + static_cast<std::size_t>(cell)] = static_cast<std::int32_t>(value);
  };
  const auto store_float = [&](std::int64_t cell, double value) {
    if (std::isfinite(value) && value != std::floor(value)) {
      throw user_error(tensor.name + position(tensor, cell) + " = " + std::to_string(value) + " is no whole number");
    }
    store(cell, value);
  };
  switch (tensor.dtype) {
    case tinker_public::DTYPE_INT64:
      return for_each_value(
          tensor, [&](std::int64_t i) { return load<std::int64_t>(tensor.values, i); }, store);
    case tinker_public::DTYPE_INT32:
      return for_each_value(
          tensor, [&](std::int64_t i) -> std::int64_t { return load<std::int32_t>(tensor.values, i); }, store);
    case tinker_public::DTYPE_FLOAT32:
      return for_each_value(
          tensor, [&](std::int64_t i) -> double { return load<float>(tensor.values, i); }, store_float);
    default:
      throw user_error(tensor.name + ": tokens must be int64 or int32, got bfloat16");
  }
}

void append_floats(const TensorView& tensor, std::vector<float>& out) {
  const std::size_t base = out.size();
  out.resize(base + static_cast<std::size_t>(tensor.cells()), 0.0f);
  const auto store = [&](std::int64_t cell, float value) {
    if (!std::isfinite(value)) {
      throw user_error("NonFiniteInTensor: " + tensor.name + position(tensor, cell) + " is " +
                       (std::isnan(value) ? "NaN"
                        : value > 0       ? "inf"
                                          : "-inf") +
                       "; every value must be finite");
    }
    out[base + static_cast<std::size_t>(cell)] = value;
  };
  switch (tensor.dtype) {
    case tinker_public::DTYPE_FLOAT32:
      return for_each_value(
          tensor, [&](std::int64_t i) { return load<float>(tensor.values, i); }, store);
    case tinker_public::DTYPE_BFLOAT16:
      return for_each_value(
          tensor, [&](std::int64_t i) { return bfloat16(load<std::uint16_t>(tensor.values, i)); }, store);
    case tinker_public::DTYPE_INT32:
      return for_each_value(
          tensor, [&](std::int64_t i) { return static_cast<float>(load<std::int32_t>(tensor.values, i)); }, store);
    default:
      return for_each_value(
          tensor, [&](std::int64_t i) { return static_cast<float>(load<std::int64_t>(tensor.values, i)); }, store);
  }
}

}  // namespace ht::tinker_api
