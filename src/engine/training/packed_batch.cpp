#include "engine/training/packed_batch.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace ht::engine {

using worker_protocol::TrainBatch;

namespace {

void check_length(const std::vector<float>& values, std::size_t targets, const char* name) {
  if (!values.empty() && values.size() != targets) {
    throw user_error(std::string(name) + " has " + std::to_string(values.size()) + " elements, target_tokens has " +
                     std::to_string(targets));
  }
}

void check(const TrainBatch& batch, const MicroBatchItem& item) {
  const int datums = batch.num_datums();
  if (item.datum_begin < 0 || item.datum_begin > item.datum_end || item.datum_end > datums) {
    throw server_error("datums " + std::to_string(item.datum_begin) + " to " + std::to_string(item.datum_end) +
                       " of a batch of " + std::to_string(datums));
  }
  if (batch.target_width.size() != static_cast<std::size_t>(datums) ||
      (datums > 0 &&
       (batch.cu_seqlens.front() != 0 || batch.cu_seqlens.back() != static_cast<std::int64_t>(batch.tokens.size())))) {
    throw server_error("a training batch whose offsets do not fit its arrays");
  }
  std::size_t targets = 0;
  for (int i = 0; i < datums; ++i) {
    const std::int32_t length = batch.cu_seqlens[i + 1] - batch.cu_seqlens[i];
    if (length < 0 || batch.target_width[i] < 1) throw server_error("a training batch with a negative length");
    targets += static_cast<std::size_t>(length) * static_cast<std::size_t>(batch.target_width[i]);
  }
  if (targets != batch.targets.size()) {
    throw user_error("target_tokens has " + std::to_string(batch.targets.size()) + " elements, expected " +
                     std::to_string(targets));
  }
  check_length(batch.weights, targets, "weights");
  check_length(batch.logprobs, targets, "logprobs");
  check_length(batch.advantages, targets, "advantages");
  check_length(batch.sequence_ratio_mask, targets, "sequence_ratio_mask");
  check_length(batch.clip_low_threshold, targets, "clip_low_threshold");
  check_length(batch.clip_high_threshold, targets, "clip_high_threshold");
  if (item.loss != worker_protocol::LossKind::cross_entropy && targets > 0 &&
      (batch.logprobs.empty() || batch.advantages.empty())) {
    throw user_error("this loss needs logprobs and advantages");
  }
}

void check_vocabulary(std::span<const std::int32_t> ids, int vocab_size, const char* what) {
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      throw user_error(std::string(what) + " " + std::to_string(id) + ": the vocabulary has the ids 0 to " +
                       std::to_string(vocab_size - 1));
    }
  }
}

}  // namespace

PackedBatch pack(std::span<const MicroBatchItem> items, int vocab_size) {
  PackedBatch packed;
  packed.cu_seqlens.push_back(0);
  packed.target_offsets.push_back(0);
  for (const MicroBatchItem& item : items) {
    const TrainBatch& batch = *item.batch;
    check(batch, item);
    PackedBatch::ItemRange range;
    range.row_begin = static_cast<std::int64_t>(packed.tokens.size());
    range.target_begin = static_cast<std::int64_t>(packed.targets.size());
    std::int64_t source = 0;
    for (int i = 0; i < item.datum_begin; ++i) {
      source += std::int64_t{batch.cu_seqlens[i + 1] - batch.cu_seqlens[i]} * batch.target_width[i];
    }
    range.source_target_begin = source;
    for (int i = item.datum_begin; i < item.datum_end; ++i) {
      const std::int32_t begin = batch.cu_seqlens[i], length = batch.cu_seqlens[i + 1] - begin;
      const std::int64_t width = batch.target_width[i];
      packed.tokens.insert(packed.tokens.end(), batch.tokens.begin() + begin, batch.tokens.begin() + begin + length);
      for (std::int32_t t = 0; t < length; ++t) {
        packed.positions.push_back(t);
        packed.target_offsets.push_back(packed.target_offsets.back() + width);
      }
      packed.cu_seqlens.push_back(static_cast<std::int32_t>(packed.tokens.size()));
      packed.targets.insert(packed.targets.end(), batch.targets.begin() + source,
                            batch.targets.begin() + source + length * width);
      source += length * width;
    }
    range.row_end = static_cast<std::int64_t>(packed.tokens.size());
    range.target_end = static_cast<std::int64_t>(packed.targets.size());
    packed.items.push_back(range);

    if (packed.adapters.empty() || packed.adapters.back() != item.adapter) {
      if (std::find(packed.adapters.begin(), packed.adapters.end(), item.adapter) != packed.adapters.end()) {
        throw server_error("the items of one adapter must be adjacent in a micro-batch");
      }
      packed.adapters.push_back(item.adapter);
      packed.segments.push_back({range.row_begin, range.row_end, nullptr});
    } else {
      packed.segments.back().row_end = range.row_end;
    }
  }
  check_vocabulary(packed.tokens, vocab_size, "token");
  check_vocabulary(packed.targets, vocab_size, "target token");
  return packed;
}

}  // namespace ht::engine
