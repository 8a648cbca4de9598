#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "engine/models/dense_decoder.h"
#include "engine/sampling/packed_adapter.h"
#include "engine/sampling/paged_attention.h"

namespace ht::engine {

// The forward pass of a batch of few rows, decoding above all: the same arithmetic as forward_hidden and logits_out,
// but one parallel region for all layers, without a tensor operation. At few rows a layer takes some hundred
// microseconds, of which dispatch, allocation and the waking of threads for each operation would be a large part.
class FewRowsForward {
 public:
  static constexpr std::int64_t kMaxRows = 32;

  // Rows [row_begin, row_end) of the batch use `adapter`; nullptr: the base model.
  struct Segment {
    std::int64_t row_begin = 0, row_end = 0;
    const PackedAdapter* adapter = nullptr;
  };

  explicit FewRowsForward(const DenseDecoder& model);

  // batch of at most kMaxRows rows; `segments` cover them. Writes the logits of the rows `wanted` (increasing) to
  // logits [wanted.size()][vocab].
  void run(const PackedSequences& batch, std::span<const Segment> segments, PagedAttention& attention,
           std::span<const std::int64_t> wanted, float* logits);

 private:
  // A matrix of kMaxRows rows. Rows are padded: strides of whole pages would share few cache sets.
  struct Buffer {
    at::Tensor tensor;
    float* data = nullptr;
    std::int64_t stride = 0;
    float* row(std::int64_t index) const { return data + index * stride; }
  };
  struct Pass;

  static Buffer make_buffer(std::int64_t columns);

  const DenseDecoder& model_;
  std::int64_t weights_ = 0;  // elements of all linears
  Buffer hidden_, normed_, qkv_, q_, k_, attended_, gate_up_, act_, u_;
};

}  // namespace ht::engine
