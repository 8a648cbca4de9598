#include "worker/sample_executor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "base/error.h"

namespace ht::worker {

namespace wp = worker_protocol;
using scheduler::SampleRow;
using wp::RequestId;

namespace {

constexpr float kUndefinedLogprob = -99999.0f;
constexpr std::int32_t kMaxSamples = 4096;
constexpr std::size_t kVersionsLoading = 4;  // at once

void check_ids(const std::vector<std::int32_t>& ids, std::int32_t lowest, std::int32_t vocab_size, const char* what) {
  for (const std::int32_t id : ids) {
    if (id >= lowest && id < vocab_size) continue;
    throw user_error(std::string(what) + " " + std::to_string(id) + ": the vocabulary has the ids 0 to " +
                     std::to_string(vocab_size - 1));
  }
}

void check_range(std::int64_t value, std::int64_t low, std::int64_t high, const char* what) {
  if (value >= low && value <= high) return;
  throw user_error(std::string(what) + " is " + std::to_string(value) + ", allowed are " + std::to_string(low) +
                   " to " + std::to_string(high));
}

template <class T>
std::span<const T> part(const std::vector<T>& values, std::int64_t begin, std::int64_t end) {
  return std::span<const T>(values).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
}

wp::TopkLogprobs undefined_topk(std::int32_t k, std::size_t rows) {
  const std::size_t cells = rows * static_cast<std::size_t>(k);
  return {k, std::vector<std::int32_t>(cells, 0), std::vector<float>(cells, kUndefinedLogprob)};
}

}  // namespace

SampleExecutor::SampleExecutor(const engine::BaseModel& model, Versions& versions, SampleOptions options, Send send)
    : model_(model),
      versions_(versions),
      options_(options),
      send_(std::move(send)),
      engine_(model, options.limits.num_blocks, options.limits.block_size),
      queue_(options.limits, [this](RequestId id) { return may_start(id); }) {}

void SampleExecutor::check(const wp::Sample& request) const {
  const std::int32_t vocab = model_.spec().vocab_size;
  const std::int64_t length = std::ssize(request.prompt);
  if (length < 1) throw user_error("the prompt is empty: at least 1 token is needed");
  if (length > options_.max_seq_len) {
    throw user_error("the prompt has " + std::to_string(length) + " tokens, the context holds " +
                     std::to_string(options_.max_seq_len));
  }
  check_ids(request.prompt, 0, vocab, "prompt token");
  check_range(request.num_samples, 1, kMaxSamples, "num_samples");
  check_range(request.params.max_tokens, 0, std::numeric_limits<std::int32_t>::max(), "max_tokens");
  check_range(request.topk_prompt_logprobs, 0, vocab, "topk_prompt_logprobs");
  check_range(request.topk_sample_logprobs, 0, vocab, "topk_sample_logprobs");
  check_range(request.prompt_alt_tokens_k, 0, vocab, "prompt_alt_tokens_k");
  check_range(request.prompt_logprobs_last_n, 0, std::max<std::int64_t>(length - 1, 0), "prompt_logprobs_last_n");
  check_range(request.target_width, 0, std::numeric_limits<std::int32_t>::max(), "target_prompt_logprobs' width");
  if (std::ssize(request.prompt_targets) != (length - 1) * request.target_width) {
    throw user_error("target_prompt_logprobs has " + std::to_string(request.prompt_targets.size()) +
                     " elements, expected " + std::to_string((length - 1) * request.target_width));
  }
  check_ids(request.prompt_targets, -1, vocab, "prompt target token");
  if (!request.params.stop_strings.empty() && token_table_.value() == nullptr) {
    throw user_error("stop strings need the model's tokenizer, which this server does not have: give stop token ids");
  }
}

void SampleExecutor::push(wp::Request request) {
  if (const auto* drop = std::get_if<wp::DropVersion>(&request.body)) {
    versions_.drop(drop->version);
    queue_.drop_version(drop->version);
    send_({request.id, wp::Done{wp::Ack{}}});
    return;
  }
  auto* sample = std::get_if<wp::Sample>(&request.body);
  if (sample == nullptr) return;
  if (!sample->params.stop_strings.empty() && !token_table_) {
    without_table_.push_back(std::move(request));
    return;
  }
  try {
    start(request.id, std::move(*sample));
  } catch (const std::exception& error) {
    active_.erase(request.id);
    send_({request.id, failure_of(error)});
  }
}

void SampleExecutor::set_token_table(std::shared_ptr<const TokenTable> table) {
  token_table_ = std::move(table);
  for (wp::Request& request : std::exchange(without_table_, {})) push(std::move(request));
}

void SampleExecutor::start(RequestId id, wp::Sample request) {
  check(request);
  Active& active = active_[id];
  active.request = std::move(request);
  active.token_table = token_table_.value_or(nullptr);
  const wp::Sample& sample = active.request;
  const std::int32_t length = active.prompt_size(), last_row = length - 1;
  active.max_tokens = std::max(1, options_.max_seq_len - length);
  if (sample.params.max_tokens > 0) {
    active.max_tokens = std::min(active.max_tokens, sample.params.max_tokens);
  } else {
    active.max_tokens =
        static_cast<std::int32_t>(std::clamp<std::int64_t>(queue_.capacity() - length + 1, 1, active.max_tokens));
  }
  active.unfinished = sample.num_samples;
  active.matchers.assign(static_cast<std::size_t>(sample.num_samples),
                         StopMatcher(sample.params.stop_strings, active.token_table.get()));
  active.logprob_begin = active.target_begin = last_row;
  if (sample.prompt_logprobs || sample.topk_prompt_logprobs > 0) {
    active.logprob_begin =
        sample.prompt_logprobs_last_n > 0 ? std::max(0, last_row - sample.prompt_logprobs_last_n) : 0;
  }
  if (sample.prompt_alt_tokens_k > 0) {
    active.target_begin = 0;
  } else if (sample.target_width > 0) {
    const auto first = std::find_if(sample.prompt_targets.begin(), sample.prompt_targets.end(),
                                    [](std::int32_t target) { return target >= 0; });
    active.target_begin = static_cast<std::int32_t>(first - sample.prompt_targets.begin()) / sample.target_width;
  }

  wp::SampleResult& result = active.result;
  result.sequences.resize(static_cast<std::size_t>(sample.num_samples));
  for (wp::SampledSequence& sequence : result.sequences) sequence.topk.k = sample.topk_sample_logprobs;
  const auto positions = static_cast<std::size_t>(length);
  if (sample.prompt_logprobs) result.prompt_logprobs.assign(positions, std::numeric_limits<float>::quiet_NaN());
  if (sample.topk_prompt_logprobs > 0) result.topk_prompt = undefined_topk(sample.topk_prompt_logprobs, positions);
  result.target_prompt_logprobs.assign(sample.prompt_targets.size(), 0.0f);
  const std::size_t alternatives = (positions - 1) * static_cast<std::size_t>(sample.prompt_alt_tokens_k);
  result.prompt_alt_tokens.resize(alternatives);
  result.prompt_alt_logprobs.resize(alternatives);

  scheduler::SampleRequest queued{
      id, sample.owner, sample.version, sample.prompt, sample.num_samples, active.max_tokens, -1};
  if (active.score_begin() < last_row) queued.score_begin = active.score_begin();
  queue_.push(std::move(queued));
}

// A request holds its version's weights from its first step on. Those of a cold version are read on the file thread:
// who wants them waits, others do not.
scheduler::SampleStart SampleExecutor::may_start(RequestId id) {
  using scheduler::SampleStart;
  Active& active = active_.at(id);
  const wp::Sample& sample = active.request;
  if (active.weights || sample.version.empty()) return SampleStart::now;
  active.weights = versions_.find(sample.version);
  if (active.weights) return SampleStart::now;
  const bool nothing_else = queue_.num_running() == 0 && loading_.empty();
  if (loading_.size() < kVersionsLoading && (versions_.may_load() || nothing_else)) {
    loading_.insert(sample.version);
    versions_.load(sample.version, sample.version_dir,
                   [this, version = sample.version](const Error* error) { loaded(version, error); });
  }
  return loading_.empty() ? SampleStart::later : SampleStart::released;
}

void SampleExecutor::loaded(const std::string& version, const Error* error) {
  loading_.erase(version);
  queue_.release();
  if (error == nullptr) return;
  std::vector<RequestId> waiting;
  for (const auto& [id, active] : active_) {
    if (active.request.version == version && !active.weights) waiting.push_back(id);
  }
  for (const RequestId id : waiting) fail(id, failure_of(*error));
}

bool SampleExecutor::cancel(RequestId id) {
  const auto waits = [id](const wp::Request& request) { return request.id == id; };
  if (std::erase_if(without_table_, waits) == 0 && !active_.contains(id)) return false;
  fail(id, {ErrorCategory::user, "the request was cancelled"});
  return true;
}

void SampleExecutor::fail(RequestId id, wp::Failure failure) {
  queue_.cancel(id);
  active_.erase(id);
  send_({id, std::move(failure)});
}

engine::StepRow SampleExecutor::step_row(const SampleRow& row, const Active& active,
                                         std::vector<engine::Draw>& draws) const {
  const wp::Sample& request = active.request;
  for (const std::int32_t sample : row.draws) draws.push_back({request.params.seed, sample});
  engine::StepRow step;
  step.adapter = active.weights.get();
  step.tokens = row.tokens;
  step.position = row.position;
  step.block_table = row.block_table;
  step.params = &request.params;
  step.draws = draws;
  step.topk_sample = request.topk_sample_logprobs;
  // Row p scores the token at p + 1.
  const std::int32_t begin = std::max(row.position, active.score_begin());
  const std::int32_t end =
      std::min(row.position + static_cast<std::int32_t>(row.tokens.size()), active.prompt_size() - 1);
  if (!row.is_prompt || begin >= end) return step;
  step.score.row_begin = begin - row.position;
  step.score.row_end = end - row.position;
  step.score.next_tokens = part(request.prompt, begin + 1, end + 1);
  step.score.topk = request.topk_prompt_logprobs;
  step.score.target_width = request.target_width;
  const std::int64_t width = request.target_width;
  step.score.targets = part(request.prompt_targets, begin * width, end * width);
  step.score.alt_tokens = request.prompt_alt_tokens_k;
  step.score.seed = request.params.seed;
  return step;
}

void SampleExecutor::take_scores(const SampleRow& row, const engine::Score& score, engine::StepRowResult& result,
                                 Active& active) const {
  wp::SampleResult& into = active.result;
  const std::size_t k = static_cast<std::size_t>(into.topk_prompt.k);
  for (std::int32_t i = 0; i < score.row_end - score.row_begin; ++i) {
    const std::int32_t position = row.position + score.row_begin + i;
    if (position < active.logprob_begin) continue;
    const auto from = static_cast<std::size_t>(i), to = static_cast<std::size_t>(position + 1);
    if (!into.prompt_logprobs.empty()) into.prompt_logprobs[to] = result.prompt_logprobs.at(from);
    for (std::size_t j = 0; j < k; ++j) {
      into.topk_prompt.token_ids[to * k + j] = result.topk_prompt.token_ids.at(from * k + j);
      into.topk_prompt.logprobs[to * k + j] = result.topk_prompt.logprobs.at(from * k + j);
    }
  }
  const std::ptrdiff_t first = row.position + score.row_begin;
  std::copy(result.target_logprobs.begin(), result.target_logprobs.end(),
            into.target_prompt_logprobs.begin() + first * score.target_width);
  std::copy(result.alt_tokens.begin(), result.alt_tokens.end(),
            into.prompt_alt_tokens.begin() + first * score.alt_tokens);
  std::copy(result.alt_logprobs.begin(), result.alt_logprobs.end(),
            into.prompt_alt_logprobs.begin() + first * score.alt_tokens);
}

// Adds the token to its sample. True when it is the last one.
bool SampleExecutor::take_draw(std::int32_t sample, const engine::DrawResult& draw, Active& active) const {
  const wp::SamplingParams& params = active.request.params;
  wp::SampledSequence& sequence = active.result.sequences[static_cast<std::size_t>(sample)];
  sequence.tokens.push_back(draw.token);
  sequence.logprobs.push_back(draw.logprob);
  sequence.topk.token_ids.insert(sequence.topk.token_ids.end(), draw.topk.token_ids.begin(), draw.topk.token_ids.end());
  sequence.topk.logprobs.insert(sequence.topk.logprobs.end(), draw.topk.logprobs.begin(), draw.topk.logprobs.end());
  const auto contains = [&draw](const std::vector<std::int32_t>& tokens) {
    return std::find(tokens.begin(), tokens.end(), draw.token) != tokens.end();
  };
  const bool matched = active.matchers[static_cast<std::size_t>(sample)].feed(draw.token);
  if (matched || contains(params.stop_tokens) || (params.stop_on_eos && contains(model_.spec().eos_token_ids))) {
    sequence.stop_reason = wp::StopReason::stop;
    return true;
  }
  return std::ssize(sequence.tokens) >= active.max_tokens;
}

void SampleExecutor::run_slice() {
  for (const std::string& version : versions_.take_forgotten()) queue_.drop_version(version);
  const scheduler::SampleStep step = queue_.next_step();
  if (step.rows.empty()) return;
  ++steps_;
  try {
    advance(step);
  } catch (const std::exception& error) {
    // How much of its keys and values a failed step has written is unknown: its requests end, nothing of it is cached.
    for (const SampleRow& row : step.rows) {
      if (active_.contains(row.request)) fail(row.request, failure_of(error));
    }
  }
}

void SampleExecutor::advance(const scheduler::SampleStep& step) {
  std::vector<std::vector<engine::Draw>> engine_draws(step.rows.size());
  std::vector<engine::StepRow> rows;
  for (std::size_t i = 0; i < step.rows.size(); ++i) {
    rows.push_back(step_row(step.rows[i], active_.at(step.rows[i].request), engine_draws[i]));
  }
  for (const scheduler::BlockCopy& copy : step.copies) engine_.copy_block(copy.from, copy.to);
  std::vector<engine::StepRowResult> results = engine_.run(rows);
  for (const engine::StepRow& row : rows) tokens_ += row.tokens.size();

  // Before the step is completed: what a failed request has in the cache must not be found by others.
  for (std::size_t i = 0; i < step.rows.size(); ++i) {
    const RequestId id = step.rows[i].request;
    if (!results[i].error.empty() && active_.contains(id)) fail(id, {ErrorCategory::user, results[i].error});
  }
  Draws draws(step.rows.size());
  for (std::size_t i = 0; i < step.rows.size(); ++i) {
    const SampleRow& row = step.rows[i];
    const auto found = active_.find(row.request);
    if (found == active_.end()) continue;
    Active& active = found->second;
    // The first chunk begins where the cached prefix ends.
    if (!std::exchange(active.started, true)) active.result.prompt_cache_hit_tokens = row.position;
    if (rows[i].score.row_begin < rows[i].score.row_end) take_scores(row, rows[i].score, results[i], active);
    for (std::size_t d = 0; d < row.draws.size(); ++d) {
      const engine::DrawResult& draw = results[i].draws.at(d);
      const bool finished = take_draw(row.draws[d], draw, active);
      draws[i].push_back({draw.token, finished});
      active.unfinished -= finished;
    }
  }
  queue_.complete(step, draws);
  for (const SampleRow& row : step.rows) {
    const auto found = active_.find(row.request);
    if (found == active_.end() || found->second.unfinished > 0) continue;
    send_({row.request, wp::Done{std::move(found->second.result)}});
    active_.erase(found);
  }
}

}  // namespace ht::worker
