#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/runtime/adapter.h"
#include "engine/runtime/base_model.h"
#include "worker_protocol/messages.h"

namespace ht::engine {

// One draw from a row's last position. The random number is a function of (seed, sample_index, position of the drawn
// token) alone.
struct Draw {
  std::uint64_t seed = 0;
  std::int32_t sample_index = 0;
};

// Prompt scoring of a chunk: chunk row i (i in [row_begin, row_end)) scores next_tokens[i - row_begin].
struct Score {
  int row_begin = 0;
  int row_end = 0;
  std::span<const std::int32_t> next_tokens;  // [row_end - row_begin]
  int topk = 0;
  int target_width = 0;
  std::span<const std::int32_t> targets;  // [(row_end - row_begin) * target_width], -1 = not requested
  int alt_tokens = 0;                     // independent draws a row, at the row's temperature
  std::uint64_t seed = 0;
};

// One sequence's part of a step: a prefill chunk, or one token of decoding. Block b of a sequence's cache holds its
// positions [b * block_size, (b + 1) * block_size) in cache block block_table[b].
struct StepRow {
  const AdapterWeights* adapter = nullptr;  // nullptr: the base model
  std::span<const std::int32_t> tokens;     // input tokens at positions [position, position + tokens.size())
  std::int32_t position = 0;
  std::span<const std::int32_t> block_table;                // covers position + tokens.size() positions
  const worker_protocol::SamplingParams* params = nullptr;  // for draws and alternative tokens
  std::span<const Draw> draws;                              // empty: this chunk does not reach the end of the prompt
  int topk_sample = 0;
  Score score;
};

struct DrawResult {
  std::int32_t token = 0;
  float logprob = 0;  // log-softmax of logits / temperature (temperature 0: of the logits), before top-k and top-p
  worker_protocol::TopkLogprobs topk;  // one row
};

struct StepRowResult {
  // Not empty: this row's logits are not finite (a diverged adapter) and nothing else here is meant; the text is for
  // the request's author. Other rows are not touched by it.
  std::string error;
  std::vector<DrawResult> draws;
  std::vector<float> prompt_logprobs;  // [row_end - row_begin], at temperature 1
  worker_protocol::TopkLogprobs topk_prompt;
  std::vector<float> target_logprobs;    // follows Score::targets, 0 where not requested
  std::vector<std::int32_t> alt_tokens;  // [(row_end - row_begin) * alt_tokens]
  std::vector<float> alt_logprobs;
};

// The sampler's forward pass over a paged KV cache.
class SamplingEngine {
 public:
  SamplingEngine(const BaseModel& model, std::int32_t num_blocks, std::int32_t block_size);
  ~SamplingEngine();

  // Runs all rows as one packed batch, writes their keys and values into the cache, draws and scores. Rows of one
  // adapter may lie anywhere in `rows`. The same rows give the same bits. Throws Error(server) for rows that are no
  // valid plan (nothing is written then).
  std::vector<StepRowResult> run(std::span<const StepRow> rows);

  // Copies cache block `from` to `to` in every layer: copy-on-write of a shared, partly filled block.
  void copy_block(std::int32_t from, std::int32_t to);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ht::engine
