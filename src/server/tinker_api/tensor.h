#pragma once

// Tensors of requests: checked views of the SDK's Tensor message, and their values in flat arrays.

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tinker_public.pb.h"

namespace ht::tinker_api {

// A tensor of one or two dimensions whose byte counts, shape and CSR indices are consistent. Points into the message.
struct TensorView {
  std::string name;  // for errors: "datum 3: weights"
  tinker_public::DType dtype = tinker_public::DTYPE_FLOAT32;
  std::int64_t rows = 0;
  std::int64_t cols = -1;  // -1: one dimension, of length `rows`
  std::string_view values;
  bool sparse = false;
  std::string_view crow_indices;  // int64 [rows + 1]
  std::string_view col_indices;   // int64, ascending within a row

  std::int64_t cells() const { return cols < 0 ? rows : rows * cols; }
  std::string shape() const;  // "(3, 2)"
};

// Throws Error(user) naming the tensor, what is wrong and what is wanted. `max_cells` bounds rows * cols.
TensorView view_tensor(const tinker_public::Tensor& tensor, std::string name, std::int64_t max_cells);

// Appends all cells in row-major order; cells that a sparse tensor does not list are 0. Error(user) for a token outside
// [0, vocab_size), and for NaN and infinities ("NonFiniteInTensor").
void append_tokens(const TensorView& tensor, std::int64_t vocab_size, std::vector<std::int32_t>& out);
void append_floats(const TensorView& tensor, std::vector<float>& out);

// Throws Error(user) unless crow/col describe `num_values` cells of a rows × cols matrix in CSR with ascending columns.
void check_csr(const std::string& name, std::int64_t rows, std::int64_t cols, std::int64_t num_values,
               std::span<const std::int64_t> crow, std::span<const std::int64_t> col);

}  // namespace ht::tinker_api
