#include "engine/sampling/step.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <optional>
#include <string>

#include "engine/ops/parallel_rows.h"
#include "engine/runtime/base_model_impl.h"
#include "engine/runtime/forward.h"
#include "engine/sampling/adapter_view_cache.h"
#include "engine/sampling/few_rows_forward.h"
#include "engine/sampling/gathered_attention.h"
#include "engine/sampling/logits_rows.h"
#include "engine/sampling/paged_attention.h"

namespace ht::engine {

namespace {

// Rows of logits in memory at a time.
constexpr std::int64_t kLogitsRows = 64;

void check_tokens(const char* what, std::span<const std::int32_t> tokens, std::int32_t least, std::int32_t vocab) {
  for (const std::int32_t token : tokens) {
    if (token < least || token >= vocab) {
      throw server_error(std::string(what) + " " + std::to_string(token) + " is outside [" + std::to_string(least) +
                         ", " + std::to_string(vocab) + ")");
    }
  }
}

void check_row(const StepRow& row, const KvCache& cache, std::int32_t vocab) {
  if (row.tokens.empty() || row.position < 0) throw server_error("a step row needs tokens at positions from 0 on");
  check_tokens("token", row.tokens, 0, vocab);
  const std::int64_t positions = std::int64_t{row.position} + static_cast<std::int64_t>(row.tokens.size());
  if (static_cast<std::int64_t>(row.block_table.size()) * cache.block_size() < positions) {
    throw server_error("a block table of " + std::to_string(row.block_table.size()) + " blocks does not cover " +
                       std::to_string(positions) + " positions");
  }
  check_tokens("cache block", row.block_table, 0, cache.num_blocks());
  const Score& score = row.score;
  const int rows = score.row_end - score.row_begin;
  const bool sizes_fit =
      score.row_begin >= 0 && rows >= 0 && score.row_end <= static_cast<int>(row.tokens.size()) &&
      score.next_tokens.size() == static_cast<std::size_t>(rows) && score.topk >= 0 && score.target_width >= 0 &&
      score.alt_tokens >= 0 &&
      score.targets.size() == static_cast<std::size_t>(rows) * static_cast<std::size_t>(score.target_width);
  if (!sizes_fit) throw server_error("a step row's score does not fit its tokens");
  check_tokens("scored token", score.next_tokens, 0, vocab);
  check_tokens("target token", score.targets, -1, vocab);
  if ((!row.draws.empty() || score.alt_tokens > 0) && row.params == nullptr) {
    throw server_error("a step row that draws has no sampling parameters");
  }
}

}  // namespace

struct SamplingEngine::Impl {
  Impl(const BaseModel& base, std::int32_t num_blocks, std::int32_t block_size)
      : model(base),
        views(base.device()),
        logits(at::empty({kLogitsRows, base.spec().vocab_size}, base.device().float_options())) {
    if (base.device().has_decode_kernels()) {
      auto paged = std::make_unique<PagedKvCache>(base.spec(), num_blocks, block_size);
      decode.emplace(Decode{*paged, FewRowsForward(base.impl().model)});
      cache = std::move(paged);
    } else {
      cache = std::make_unique<GatheredKvCache>(base.device(), base.spec(), num_blocks, block_size);
    }
  }

  // hidden (T, hidden), `segments` in its rows, `wanted` in its order.
  void draw_and_score(std::span<const StepRow> rows, const at::Tensor& hidden, std::span<const LoraSegment> segments,
                      std::span<const LogitsRow> wanted, std::vector<StepRowResult>& results);
  // The first wanted.size() rows of `logits` are those of `wanted`.
  void draw_and_score(std::span<const StepRow> rows, std::span<const LogitsRow> wanted,
                      std::vector<StepRowResult>& results);

  // The steps of few rows on a device that has kernels for them.
  struct Decode {
    PagedKvCache& cache;
    FewRowsForward few_rows;
  };

  const BaseModel& model;
  std::unique_ptr<KvCache> cache;
  std::optional<Decode> decode;
  AdapterViewCache views;
  at::Tensor logits;  // (kLogitsRows, vocab) float32 on the device, reused
};

SamplingEngine::SamplingEngine(const BaseModel& model, std::int32_t num_blocks, std::int32_t block_size) {
  if (num_blocks < 1 || block_size < 1) {
    throw server_error("a cache of " + std::to_string(num_blocks) + " blocks of " + std::to_string(block_size) +
                       " positions: both must be at least 1");
  }
  impl_ = std::make_unique<Impl>(model, num_blocks, block_size);
}

SamplingEngine::~SamplingEngine() = default;

std::vector<StepRowResult> SamplingEngine::run(std::span<const StepRow> rows) {
  const c10::InferenceMode inference;
  const std::int32_t vocab = impl_->model.spec().vocab_size;
  for (const StepRow& row : rows) check_row(row, *impl_->cache, vocab);
  std::vector<StepRowResult> results(rows.size());
  if (rows.empty()) return results;
  impl_->views.drop_dead();

  // Rows of one adapter side by side, adapters in the order of their first row.
  std::vector<const AdapterWeights*> adapters;
  for (const StepRow& row : rows) {
    if (std::find(adapters.begin(), adapters.end(), row.adapter) == adapters.end()) adapters.push_back(row.adapter);
  }
  std::vector<std::int32_t> tokens, positions;
  std::vector<std::int32_t> cu_seqlens = {0};
  std::vector<CachedSequence> sequences;
  std::vector<std::int64_t> adapter_ends;
  std::vector<LogitsRow> wanted;
  for (const AdapterWeights* adapter : adapters) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const StepRow& row = rows[i];
      if (row.adapter != adapter) continue;
      const auto begin = static_cast<std::int64_t>(tokens.size());
      tokens.insert(tokens.end(), row.tokens.begin(), row.tokens.end());
      for (std::size_t j = 0; j < row.tokens.size(); ++j) {
        positions.push_back(row.position + static_cast<std::int32_t>(j));
      }
      cu_seqlens.push_back(static_cast<std::int32_t>(tokens.size()));
      sequences.push_back({begin, static_cast<std::int64_t>(tokens.size()), row.position, row.block_table});
      prepare_result(row, results[i]);
      append_logits_rows(row, i, begin, wanted);
    }
    adapter_ends.push_back(static_cast<std::int64_t>(tokens.size()));
  }

  const PackedSequences batch{tokens, positions, cu_seqlens};
  if (impl_->decode && batch.num_tokens() <= FewRowsForward::kMaxRows) {
    PagedAttention attention(impl_->model.spec(), impl_->decode->cache, sequences);
    std::vector<FewRowsForward::Segment> segments;
    for (std::size_t i = 0; i < adapters.size(); ++i) {
      segments.push_back({i == 0 ? 0 : adapter_ends[i - 1], adapter_ends[i],
                          adapters[i] == nullptr ? nullptr : impl_->views.packed(*adapters[i])});
    }
    std::vector<std::int64_t> wanted_rows;
    for (const LogitsRow& row : wanted) wanted_rows.push_back(row.packed_row);
    impl_->decode->few_rows.run(batch, segments, attention, wanted_rows, impl_->logits.data_ptr<float>());
    impl_->draw_and_score(rows, wanted, results);
    return results;
  }
  std::vector<LoraSegment> segments;
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    segments.push_back({i == 0 ? 0 : adapter_ends[i - 1], adapter_ends[i],
                        adapters[i] == nullptr ? nullptr : impl_->views.get(*adapters[i])});
  }
  const std::unique_ptr<InferenceAttention> attention = impl_->cache->attention(sequences);
  const at::Tensor hidden = forward_hidden(impl_->model, batch, segments, *attention);
  impl_->draw_and_score(rows, hidden, segments, wanted, results);
  return results;
}

void SamplingEngine::Impl::draw_and_score(std::span<const StepRow> rows, const at::Tensor& hidden,
                                          std::span<const LoraSegment> segments, std::span<const LogitsRow> wanted,
                                          std::vector<StepRowResult>& results) {
  for (std::size_t begin = 0; begin < wanted.size(); begin += kLogitsRows) {
    const auto chunk = wanted.subspan(begin, std::min<std::size_t>(kLogitsRows, wanted.size() - begin));
    const auto size = static_cast<std::int64_t>(chunk.size());
    const at::Tensor index = at::empty({size}, at::kLong);
    std::vector<LoraSegment> chunk_segments;
    std::size_t segment = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t row = chunk[static_cast<std::size_t>(i)].packed_row;
      index.data_ptr<std::int64_t>()[i] = row;
      while (row >= segments[segment].row_end) ++segment;
      if (chunk_segments.empty() || chunk_segments.back().adapter != segments[segment].adapter) {
        chunk_segments.push_back({i, i, segments[segment].adapter});
      }
      chunk_segments.back().row_end = i + 1;
    }
    at::Tensor chunk_logits = logits.narrow(0, 0, size);
    logits_out(model, hidden.index_select(0, index.to(hidden.device())), chunk_segments, chunk_logits);
    draw_and_score(rows, chunk, results);
  }
}

void SamplingEngine::Impl::draw_and_score(std::span<const StepRow> rows, std::span<const LogitsRow> wanted,
                                          std::vector<StepRowResult>& results) {
  const auto vocab = static_cast<std::size_t>(model.spec().vocab_size);
  const at::Tensor host = logits.narrow(0, 0, static_cast<std::int64_t>(wanted.size())).cpu();
  const float* data = host.const_data_ptr<float>();
  std::vector<char> finite(wanted.size());
  const auto size = static_cast<std::int64_t>(wanted.size());
  parallel_rows(size, model.spec().vocab_size, [&](std::int64_t from, std::int64_t to) {
    for (auto i = static_cast<std::size_t>(from); i < static_cast<std::size_t>(to); ++i) {
      const LogitsRow& where = wanted[i];
      const std::span<const float> row(data + i * vocab, vocab);
      finite[i] = fill_result(rows[where.step_row], where, row, results[where.step_row]);
    }
  });
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const StepRow& row = rows[wanted[i].step_row];
    if (finite[i]) continue;
    results[wanted[i].step_row].error = "the logits at position " + std::to_string(row.position + wanted[i].chunk_row) +
                                        " are not finite: the adapter's weights have diverged";
  }
}

void SamplingEngine::copy_block(std::int32_t from, std::int32_t to) {
  for (const std::int32_t block : {from, to}) {
    if (block < 0 || block >= impl_->cache->num_blocks()) {
      throw server_error("cache block " + std::to_string(block) + " is outside [0, " +
                         std::to_string(impl_->cache->num_blocks()) + ")");
    }
  }
  impl_->cache->copy_block(from, to);
}

}  // namespace ht::engine
