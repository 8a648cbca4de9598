#include "scheduler/sample_queue.h"

#include <algorithm>

#include "base/error.h"

namespace ht::scheduler {

std::int32_t SampleQueue::Sequence::token(std::int32_t position) const {
  const auto prompt_size = static_cast<std::int32_t>(request->prompt.size());
  return position < prompt_size ? request->prompt[static_cast<std::size_t>(position)]
                                : generated[static_cast<std::size_t>(position - prompt_size)];
}

SampleQueue::SampleQueue(const SampleLimits& limits)
    : limits_(limits), allocator_(limits.num_blocks), cache_(allocator_) {}

std::int32_t SampleQueue::blocks_for(std::int64_t positions) const {
  return static_cast<std::int32_t>((positions + limits_.block_size - 1) / limits_.block_size);
}

void SampleQueue::push(SampleRequest request) {
  if (request.prompt.empty()) throw user_error("the prompt is empty: at least 1 token is needed");
  if (request.num_samples < 1) {
    throw user_error("num_samples is " + std::to_string(request.num_samples) + ": at least 1 is needed");
  }
  if (request.max_tokens < 1) {
    throw user_error("max_tokens is " + std::to_string(request.max_tokens) + ": at least 1 is needed");
  }
  // The last token drawn is never an input: it takes no place in the cache.
  const std::int64_t positions = static_cast<std::int64_t>(request.prompt.size()) + request.max_tokens - 1;
  if (positions > capacity()) {
    throw user_error("a prompt of " + std::to_string(request.prompt.size()) + " tokens and max_tokens " +
                     std::to_string(request.max_tokens) + " do not fit the cache of " + std::to_string(capacity()) +
                     " tokens (kv_cache_tokens of the backend config)");
  }
  const std::uint64_t arrival = next_arrival_++;
  arrival_of_[request.id] = arrival;
  Sequence sequence;
  sequence.request = std::make_shared<const SampleRequest>(std::move(request));
  waiting_.emplace(SequenceKey{arrival, -1}, std::move(sequence));
}

bool SampleQueue::cancel(RequestId id) {
  const auto found = arrival_of_.find(id);
  if (found == arrival_of_.end()) return false;
  for (Sequences* sequences : {&waiting_, &running_}) {
    const auto first = sequences->lower_bound(SequenceKey{found->second, -1});
    const auto last = sequences->lower_bound(SequenceKey{found->second + 1, -1});
    for (auto it = first; it != last; ++it) release_blocks(it->second);
    sequences->erase(first, last);
  }
  arrival_of_.erase(found);
  return true;
}

void SampleQueue::release_blocks(Sequence& sequence) {
  for (const BlockId block : sequence.blocks) allocator_.release(block);
  sequence.blocks.clear();
}

std::optional<BlockId> SampleQueue::allocate() {
  if (allocator_.num_free() == 0) cache_.evict_one();
  return allocator_.allocate();
}

void SampleQueue::preempt(Sequences::iterator sequence) {
  ++num_preemptions_;
  release_blocks(sequence->second);
  sequence->second.computed = 0;
  sequence->second.decoding = false;
  sequence->second.node = 0;
  sequence->second.cached_blocks = 0;
  waiting_.insert(running_.extract(sequence));
}

SampleStep SampleQueue::next_step() {
  SampleStep step;
  add_decode_rows(step);
  add_prefill_rows(step);
  const auto version = [this](const SampleRow& row) -> const std::string& {
    return running_.at(row.sequence).request->version;
  };
  std::stable_sort(step.rows.begin(), step.rows.end(),
                   [&](const SampleRow& a, const SampleRow& b) { return version(a) < version(b); });
  return step;
}

void SampleQueue::add_decode_rows(SampleStep& step) {
  for (auto it = running_.begin(); it != running_.end();) {
    if (std::ssize(step.rows) == limits_.max_sequences) break;
    if (!it->second.decoding) {
      ++it;
      continue;
    }
    // Older sequences go first: those that came last give up their blocks, this one at the latest.
    bool preempted_itself = false;
    while (!make_room(it, step)) {
      const auto victim = std::prev(running_.end());
      preempted_itself = victim == it;
      preempt(victim);
      if (preempted_itself) break;
    }
    if (preempted_itself) break;
    add_row(it->first, it->second, 1, step);
    ++it;
  }
}

// Sees to it that the next position has a block of the sequence's own. False: no block is left.
bool SampleQueue::make_room(Sequences::iterator entry, SampleStep& step) {
  Sequence& sequence = entry->second;
  const auto index = static_cast<std::size_t>(sequence.computed / limits_.block_size);
  if (index < sequence.blocks.size() && allocator_.references(sequence.blocks[index]) == 1) return true;
  const std::optional<BlockId> block = allocate();
  if (!block) return false;
  if (index == sequence.blocks.size()) {
    sequence.blocks.push_back(*block);
  } else {
    step.copies.push_back({sequence.blocks[index], *block});
    allocator_.release(sequence.blocks[index]);
    sequence.blocks[index] = *block;
  }
  return true;
}

void SampleQueue::add_prefill_rows(SampleStep& step) {
  std::int32_t budget = limits_.prefill_chunk_tokens;
  for (auto& [key, sequence] : running_) {
    if (budget == 0) return;
    if (sequence.decoding) continue;
    const std::int32_t tokens = std::min(budget, sequence.size() - sequence.computed);
    add_row(key, sequence, tokens, step);
    budget -= tokens;
  }
  for (auto it = waiting_.begin(); it != waiting_.end() && budget > 0;) {
    if (num_running() >= limits_.max_sequences) return;
    const auto candidate = it++;
    const SequenceKey key = candidate->first;
    const Admission admission = admit(candidate);
    if (admission == Admission::deferred) continue;
    if (admission == Admission::no_room) return;
    const Sequence& sequence = running_.at(key);
    const std::int32_t tokens = std::min(budget, sequence.size() - sequence.computed);
    add_row(key, sequence, tokens, step);
    budget -= tokens;
  }
}

// Positions of the prompt that need not be computed when they are cached.
std::int32_t SampleQueue::reusable_positions(const Sequence& sequence) const {
  const SampleRequest& request = *sequence.request;
  const std::int32_t limit = std::min(static_cast<std::int32_t>(request.prompt.size()), sequence.size() - 1);
  // A sequence that has drawn already was scored before.
  const bool to_score = sequence.generated.empty() && request.score_begin >= 0;
  return to_score ? std::min(limit, request.score_begin) : limit;
}

// The blocks of the longest cached prefix, referenced. Sets node and cached_blocks.
std::vector<BlockId> SampleQueue::find_prefix(Sequence& sequence) {
  const std::int32_t limit = reusable_positions(sequence);
  const std::span<const std::int32_t> prompt(sequence.request->prompt);
  const auto size = static_cast<std::size_t>(limits_.block_size);
  sequence.node = cache_.root(sequence.request->version);
  sequence.cached_blocks = 0;
  std::vector<BlockId> blocks;
  while ((sequence.cached_blocks + 1) * limits_.block_size <= limit) {
    const auto hit = cache_.find(sequence.node, prompt.subspan(blocks.size() * size, size));
    if (!hit) break;
    allocator_.add_reference(hit->block);
    blocks.push_back(hit->block);
    sequence.node = hit->node;
    ++sequence.cached_blocks;
  }
  return blocks;
}

// Whether a prompt that is being computed will soon give this one a longer cached prefix than it has found.
bool SampleQueue::prefix_in_flight(const Sequence& candidate) const {
  const std::int32_t end = (candidate.cached_blocks + 1) * limits_.block_size;
  if (end > reusable_positions(candidate)) return false;
  const SampleRequest& request = *candidate.request;
  return std::any_of(running_.begin(), running_.end(), [&](const auto& entry) {
    const Sequence& other = entry.second;
    const std::vector<std::int32_t>& prompt = other.request->prompt;
    return !other.decoding && other.request->version == request.version && std::ssize(prompt) >= end &&
           std::equal(prompt.begin(), prompt.begin() + end, request.prompt.begin());
  });
}

// Moves the candidate to the running ones, with blocks for all of its tokens, if they are there.
SampleQueue::Admission SampleQueue::admit(Sequences::iterator candidate) {
  Sequence& sequence = candidate->second;
  sequence.blocks = find_prefix(sequence);
  const std::int32_t missing = blocks_for(sequence.size()) - sequence.cached_blocks;
  const bool deferred = prefix_in_flight(sequence);
  if (deferred || missing > num_free_blocks()) {
    release_blocks(sequence);
    return deferred ? Admission::deferred : Admission::no_room;
  }
  sequence.computed = sequence.cached_blocks * limits_.block_size;
  for (std::int32_t i = 0; i < missing; ++i) sequence.blocks.push_back(allocate().value());
  running_.insert(waiting_.extract(candidate));
  return Admission::admitted;
}

void SampleQueue::add_row(const SequenceKey& key, const Sequence& sequence, std::int32_t tokens,
                          SampleStep& step) const {
  SampleRow row;
  row.sequence = key;
  row.request = sequence.request->id;
  row.position = sequence.computed;
  const std::int32_t end = sequence.computed + tokens;
  for (std::int32_t position = row.position; position < end; ++position) row.tokens.push_back(sequence.token(position));
  row.block_table.assign(sequence.blocks.begin(), sequence.blocks.begin() + blocks_for(end));
  row.is_prompt = key.sample < 0;
  if (end == sequence.size()) {
    if (row.is_prompt) {
      for (std::int32_t sample = 0; sample < sequence.request->num_samples; ++sample) row.draws.push_back(sample);
    } else {
      row.draws.push_back(key.sample);
    }
  }
  step.rows.push_back(std::move(row));
}

void SampleQueue::cache_prompt_blocks(Sequence& sequence) {
  const std::span<const std::int32_t> prompt(sequence.request->prompt);
  const std::int32_t limit = std::min(sequence.computed, static_cast<std::int32_t>(prompt.size()));
  for (; (sequence.cached_blocks + 1) * limits_.block_size <= limit; ++sequence.cached_blocks) {
    const auto index = static_cast<std::size_t>(sequence.cached_blocks);
    const auto size = static_cast<std::size_t>(limits_.block_size);
    sequence.node = cache_.insert(sequence.node, prompt.subspan(index * size, size), sequence.blocks[index]);
  }
}

void SampleQueue::complete(const SampleStep& step, std::span<const std::vector<SampleDraw>> draws) {
  for (std::size_t i = 0; i < step.rows.size(); ++i) {
    const SampleRow& row = step.rows[i];
    const auto entry = running_.find(row.sequence);
    if (entry == running_.end()) continue;
    Sequence& sequence = entry->second;
    sequence.computed += static_cast<std::int32_t>(row.tokens.size());
    if (!sequence.decoding) cache_prompt_blocks(sequence);
    if (row.draws.empty()) continue;
    sequence.decoding = true;
    if (row.is_prompt) {
      part(entry, row.draws, draws[i]);
    } else {
      sequence.generated.push_back(draws[i].front().token);
      if (draws[i].front().finished) {
        release_blocks(sequence);
        running_.erase(entry);
      }
    }
    const auto left = [&](const Sequences& sequences) {
      const auto next = sequences.lower_bound(SequenceKey{row.sequence.arrival, -1});
      return next != sequences.end() && next->first.arrival == row.sequence.arrival;
    };
    if (!left(running_) && !left(waiting_)) arrival_of_.erase(row.request);
  }
}

// The samples go their own ways: they share all blocks until each writes into the last, partly filled one.
void SampleQueue::part(Sequences::iterator prompt, const std::vector<std::int32_t>& samples,
                       const std::vector<SampleDraw>& draws) {
  for (std::size_t i = 0; i < samples.size(); ++i) {
    if (draws[i].finished) continue;
    Sequence sequence = prompt->second;
    for (const BlockId block : sequence.blocks) allocator_.add_reference(block);
    sequence.generated.push_back(draws[i].token);
    running_.emplace(SequenceKey{prompt->first.arrival, samples[i]}, std::move(sequence));
  }
  release_blocks(prompt->second);
  running_.erase(prompt);
}

}  // namespace ht::scheduler
