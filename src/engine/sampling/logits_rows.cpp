#include "engine/sampling/logits_rows.h"

#include "engine/sampling/token_distribution.h"

namespace ht::engine {

namespace {

bool draw(const StepRow& row, const LogitsRow& where, std::span<const float> logits, StepRowResult& result) {
  const worker_protocol::SamplingParams& params = *row.params;
  const TokenDistribution distribution(logits, params.temperature, params.top_k, params.top_p);
  if (!distribution.finite()) return false;
  const std::int32_t position = row.position + where.chunk_row + 1;
  worker_protocol::TopkLogprobs topk;
  if (row.topk_sample > 0) {
    topk.k = row.topk_sample;
    topk.token_ids.resize(static_cast<std::size_t>(topk.k));
    topk.logprobs.resize(static_cast<std::size_t>(topk.k));
    distribution.top(topk.k, topk.token_ids.data(), topk.logprobs.data());
  }
  for (std::size_t i = 0; i < row.draws.size(); ++i) {
    DrawResult& drawn = result.draws[i];
    drawn.token =
        distribution.draw(draw_unit(row.draws[i].seed, position, row.draws[i].sample_index, DrawStream::sample));
    drawn.logprob = distribution.logprob(drawn.token);
    drawn.topk = topk;
  }
  return true;
}

bool score(const StepRow& row, const LogitsRow& where, std::span<const float> logits, StepRowResult& result) {
  const Score& score = row.score;
  const TokenDistribution distribution(logits, 1.0f);
  if (!distribution.finite()) return false;
  const auto index = static_cast<std::size_t>(where.chunk_row - score.row_begin);
  result.prompt_logprobs[index] = distribution.logprob(score.next_tokens[index]);
  if (score.topk > 0) {
    const std::size_t cell = index * static_cast<std::size_t>(score.topk);
    distribution.top(score.topk, &result.topk_prompt.token_ids[cell], &result.topk_prompt.logprobs[cell]);
  }
  const auto width = static_cast<std::size_t>(score.target_width);
  for (std::size_t i = index * width; i < (index + 1) * width; ++i) {
    if (score.targets[i] >= 0) result.target_logprobs[i] = distribution.logprob(score.targets[i]);
  }
  if (score.alt_tokens == 0) return true;
  const TokenDistribution alternatives(logits, row.params->temperature);
  const std::int32_t position = row.position + where.chunk_row + 1;
  for (int i = 0; i < score.alt_tokens; ++i) {
    const std::int32_t token = alternatives.draw(draw_unit(score.seed, position, i, DrawStream::alternative));
    const std::size_t cell = index * static_cast<std::size_t>(score.alt_tokens) + static_cast<std::size_t>(i);
    result.alt_tokens[cell] = token;
    result.alt_logprobs[cell] = alternatives.logprob(token);
  }
  return true;
}

}  // namespace

void append_logits_rows(const StepRow& row, std::size_t step_row, std::int64_t packed_begin,
                        std::vector<LogitsRow>& wanted) {
  const int size = static_cast<int>(row.tokens.size());
  for (int i = row.score.row_begin; i < row.score.row_end; ++i) {
    wanted.push_back({packed_begin + i, step_row, i, i == size - 1 && !row.draws.empty(), true});
  }
  if (!row.draws.empty() && row.score.row_end < size) {
    wanted.push_back({packed_begin + size - 1, step_row, size - 1, true, false});
  }
}

void prepare_result(const StepRow& row, StepRowResult& result) {
  const Score& score = row.score;
  const auto rows = static_cast<std::size_t>(score.row_end - score.row_begin);
  result.draws.resize(row.draws.size());
  result.prompt_logprobs.resize(rows);
  result.topk_prompt.k = score.topk;
  result.topk_prompt.token_ids.resize(rows * static_cast<std::size_t>(score.topk));
  result.topk_prompt.logprobs.resize(rows * static_cast<std::size_t>(score.topk));
  result.target_logprobs.resize(rows * static_cast<std::size_t>(score.target_width));
  result.alt_tokens.resize(rows * static_cast<std::size_t>(score.alt_tokens));
  result.alt_logprobs.resize(rows * static_cast<std::size_t>(score.alt_tokens));
}

bool fill_result(const StepRow& row, const LogitsRow& where, std::span<const float> logits, StepRowResult& result) {
  return (!where.draws || draw(row, where, logits, result)) && (!where.scores || score(row, where, logits, result));
}

}  // namespace ht::engine
