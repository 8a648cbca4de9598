#include "engine/layers/head.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "engine/ops/lora.h"

namespace ht::engine {

namespace {

// Rows of a chunk: enough for the GEMM's speed, few enough that a chunk's logits stay small beside the activations.
constexpr std::int64_t kChunkRows = 256;

// The part of `segments` inside [begin, end), in rows relative to begin.
std::vector<LoraSegment> clip(std::span<const LoraSegment> segments, std::int64_t begin, std::int64_t end) {
  std::vector<LoraSegment> clipped;
  for (const LoraSegment& segment : segments) {
    const std::int64_t from = std::max(segment.row_begin, begin), to = std::min(segment.row_end, end);
    if (from < to) clipped.push_back({from - begin, to - begin, segment.adapter});
  }
  return clipped;
}

bool all_zero(const float* values, std::int64_t begin, std::int64_t end) {
  return std::all_of(values + begin, values + end, [](float v) { return v == 0.0f; });
}

}  // namespace

void Head::logits_out(const at::Tensor& hidden, std::span<const LoraSegment> segments, at::Tensor& out) const {
  linear_forward_out(unembedding, hidden, out);
  lora_forward(LoraView::of_unembedding(segments), hidden, out);
}

void Head::logprobs(const Device& device, const at::Tensor& hidden, std::span<const LoraSegment> segments,
                    const RowTargets& targets, std::int64_t row_begin, std::int64_t row_end, float* logprobs,
                    const std::function<void()>& between_chunks) const {
  const std::int64_t vocab = unembedding.weight.size(0);
  const at::Tensor buffer = at::empty({std::min(kChunkRows, row_end - row_begin), vocab}, device.float_options());
  for (std::int64_t begin = row_begin; begin < row_end; begin += kChunkRows) {
    const std::int64_t rows = std::min(kChunkRows, row_end - begin);
    at::Tensor chunk = buffer.narrow(0, 0, rows);
    logits_out(hidden.narrow(0, begin, rows), clip(segments, begin, begin + rows), chunk);
    gather_logprobs(device, chunk, logsumexp_rows(device, chunk), targets, begin, logprobs);
    if (between_chunks) between_chunks();
  }
}

at::Tensor Head::loss_backward(const Device& device, const at::Tensor& hidden, std::span<const LoraSegment> segments,
                               const RowTargets& targets, const TokenLoss& loss, float* logprobs,
                               const std::function<void()>& between_chunks) const {
  const std::int64_t total = hidden.size(0), vocab = unembedding.weight.size(0);
  const at::Tensor buffer = at::empty({std::min(kChunkRows, total), vocab}, device.float_options());
  at::Tensor dhidden = at::empty_like(hidden);
  std::vector<float> dlogprobs(targets.targets.size());
  for (std::int64_t begin = 0; begin < total; begin += kChunkRows) {
    const std::int64_t rows = std::min(kChunkRows, total - begin), end = begin + rows;
    at::Tensor chunk = buffer.narrow(0, 0, rows);
    const at::Tensor x = hidden.narrow(0, begin, rows);
    const std::vector<LoraSegment> clipped = clip(segments, begin, end);
    const LoraView lora = LoraView::of_unembedding(clipped);
    linear_forward_out(unembedding, x, chunk);
    lora_forward(lora, x, chunk);
    const at::Tensor lse = logsumexp_rows(device, chunk);
    gather_logprobs(device, chunk, lse, targets, begin, logprobs);
    loss(targets.offsets[begin], targets.offsets[end], logprobs, dlogprobs.data());

    // Prompts carry no loss: the rows before the first and after the last that do are left out.
    std::int64_t first = begin, last = end;
    while (first < end && all_zero(dlogprobs.data(), targets.offsets[first], targets.offsets[first + 1])) ++first;
    while (last > first && all_zero(dlogprobs.data(), targets.offsets[last - 1], targets.offsets[last])) --last;
    if (first > begin) dhidden.narrow(0, begin, first - begin).zero_();
    if (last < end) dhidden.narrow(0, last, end - last).zero_();
    if (first == last) {
      if (between_chunks) between_chunks();
      continue;
    }
    at::Tensor active_logits = chunk.narrow(0, first - begin, last - first);
    const at::Tensor dlogits = logprobs_backward(device, active_logits, lse.narrow(0, first - begin, last - first),
                                                 targets, first, dlogprobs.data());
    at::Tensor dx = dhidden.narrow(0, first, last - first);
    linear_backward_out(unembedding, dlogits, dx);
    const at::Tensor x_active = hidden.narrow(0, first, last - first);
    const std::vector<LoraSegment> active = clip(segments, first, last);
    const LoraView lora_active = LoraView::of_unembedding(active);
    lora_backward(lora_active, x_active, lora_project(lora_active, x_active), dlogits, dx);
    if (between_chunks) between_chunks();
  }
  return dhidden;
}

}  // namespace ht::engine
