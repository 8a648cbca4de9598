#include "scheduler/sample_queue.h"

#include <algorithm>
#include <tuple>

#include "base/error.h"

namespace ht::scheduler {

namespace {

// Waiting sequences of an owner that a step looks at before one that can start.
constexpr int kLookAhead = 256;

}  // namespace

std::int32_t SampleQueue::Sequence::token(std::int32_t position) const {
  const auto prompt_size = static_cast<std::int32_t>(request->prompt.size());
  return position < prompt_size ? request->prompt[static_cast<std::size_t>(position)]
                                : generated[static_cast<std::size_t>(position - prompt_size)];
}

SampleQueue::SampleQueue(const SampleLimits& limits, std::function<SampleStart(RequestId)> may_start)
    : limits_(limits), allocator_(limits.num_blocks), cache_(allocator_), may_start_(std::move(may_start)) {}

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
  add_waiting(SequenceKey{arrival, -1}, std::move(sequence));
}

void SampleQueue::add_waiting(const SequenceKey& key, Sequence sequence) {
  waiting_of_[sequence.request->owner].insert(key);
  waiting_.emplace(key, std::move(sequence));
}

// Of the owner's index alone.
void SampleQueue::forget_waiting(Sequences::iterator entry) {
  const auto owner = waiting_of_.find(entry->second.request->owner);
  owner->second.erase(entry->first);
  if (owner->second.empty()) waiting_of_.erase(owner);
}

bool SampleQueue::ready() const {
  return !running_.empty() || std::any_of(waiting_.begin(), waiting_.end(), [this](const auto& entry) {
    return !held_.contains(entry.second.request->version);
  });
}

bool SampleQueue::cancel(RequestId id) {
  const auto found = arrival_of_.find(id);
  if (found == arrival_of_.end()) return false;
  for (Sequences* sequences : {&waiting_, &running_}) {
    const auto first = sequences->lower_bound(SequenceKey{found->second, -1});
    const auto last = sequences->lower_bound(SequenceKey{found->second + 1, -1});
    for (auto it = first; it != last; ++it) {
      release_blocks(it->second);
      if (sequences == &waiting_) forget_waiting(it);
    }
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
  const SequenceKey key = sequence->first;
  add_waiting(key, std::move(running_.extract(sequence).mapped()));
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

std::map<std::string, std::int32_t> SampleQueue::running_of_owners() const {
  std::map<std::string, std::int32_t> running;
  for (const auto& [key, sequence] : running_) ++running[sequence.request->owner];
  return running;
}

// The sequences that decode in this step: owners take turns, the one of the oldest sequence first; an owner's own go by
// age.
std::vector<SequenceKey> SampleQueue::decode_order() const {
  std::map<std::string, std::size_t> index;
  std::vector<std::vector<SequenceKey>> owners;
  for (const auto& [key, sequence] : running_) {
    if (!sequence.decoding) continue;
    const auto [found, is_new] = index.try_emplace(sequence.request->owner, owners.size());
    if (is_new) owners.emplace_back();
    owners[found->second].push_back(key);
  }
  std::vector<SequenceKey> order;
  for (std::size_t round = 0;; ++round) {
    bool any = false;
    for (const std::vector<SequenceKey>& keys : owners) {
      if (round >= keys.size()) continue;
      if (std::ssize(order) == limits_.max_sequences) return order;
      order.push_back(keys[round]);
      any = true;
    }
    if (!any) return order;
  }
}

// Who gives up its blocks: the youngest sequence of the owner with the most.
SampleQueue::Sequences::iterator SampleQueue::victim(const std::set<SequenceKey>& kept) {
  std::map<std::string, std::pair<std::int32_t, Sequences::iterator>> youngest;  // with the number of sequences
  for (auto it = running_.begin(); it != running_.end(); ++it) {
    auto& [count, last] = youngest[it->second.request->owner];
    ++count;
    if (count == 1 || !kept.contains(it->first)) last = it;
  }
  auto chosen = running_.end();
  std::int32_t most = 0;
  for (const auto& [owner, entry] : youngest) {
    const auto& [count, last] = entry;
    if (kept.contains(last->first)) continue;
    if (chosen != running_.end() && std::tie(count, last->first) < std::tie(most, chosen->first)) continue;
    std::tie(most, chosen) = entry;
  }
  return chosen;
}

void SampleQueue::add_decode_rows(SampleStep& step) {
  std::set<SequenceKey> kept;  // in this step: it will write into its blocks
  for (const SequenceKey& key : decode_order()) {
    bool preempted_itself = !running_.contains(key);
    while (!preempted_itself && !make_room(running_.find(key), step)) {
      const auto loser = victim(kept);
      preempted_itself = loser->first == key;
      preempt(loser);
    }
    if (preempted_itself) continue;
    kept.insert(key);
    add_row(key, running_.at(key), 1, step);
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
  admit_waiting(budget, step);
}

// The owner with the fewest running sequences is next. An owner that has less than its even share of the rows need not
// wait for others' sequences to end.
void SampleQueue::admit_waiting(std::int32_t budget, SampleStep& step) {
  if (waiting_.empty() || budget == 0) return;
  struct Owner {
    std::int32_t running = 0;
    std::vector<SequenceKey> waiting;  // the oldest ones
    std::size_t next = 0;
  };
  std::map<std::string, std::int32_t> running = running_of_owners();
  std::vector<Owner> owners;
  for (const auto& [name, keys] : waiting_of_) {
    Owner& owner = owners.emplace_back();
    owner.running = running[name];
    for (auto key = keys.begin(); key != keys.end() && std::ssize(owner.waiting) < kLookAhead; ++key) {
      owner.waiting.push_back(*key);
    }
  }
  const std::int32_t share = std::max(1, limits_.max_sequences / static_cast<std::int32_t>(running.size()));
  std::int32_t owners_running = 0;
  for (const auto& [name, count] : running) owners_running += count > 0;
  while (budget > 0) {
    Owner* chosen = nullptr;
    for (Owner& owner : owners) {
      if (owner.next == owner.waiting.size()) continue;
      if (chosen != nullptr && std::tie(chosen->running, chosen->waiting[chosen->next]) <
                                   std::tie(owner.running, owner.waiting[owner.next])) {
        continue;
      }
      chosen = &owner;
    }
    if (chosen == nullptr) return;
    if (num_running() >= limits_.max_sequences &&
        (chosen->running >= share || owners_running >= limits_.max_sequences)) {
      return;
    }
    const SequenceKey key = chosen->waiting[chosen->next++];
    const Admission admission = admit(waiting_.find(key));
    if (admission == Admission::deferred) continue;
    if (admission == Admission::no_room) return;
    owners_running += chosen->running++ == 0;
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
  if (held_.contains(sequence.request->version)) return Admission::deferred;
  sequence.blocks = find_prefix(sequence);
  const std::int32_t missing = blocks_for(sequence.size()) - sequence.cached_blocks;
  bool deferred = prefix_in_flight(sequence);
  const bool no_room = !deferred && missing > num_free_blocks();
  if (!deferred && !no_room && may_start_) {
    const SampleStart start = may_start_(sequence.request->id);
    if (start == SampleStart::released) held_.insert(sequence.request->version);
    deferred = start != SampleStart::now;
  }
  if (deferred || no_room) {
    release_blocks(sequence);
    return deferred ? Admission::deferred : Admission::no_room;
  }
  sequence.computed = sequence.cached_blocks * limits_.block_size;
  for (std::int32_t i = 0; i < missing; ++i) sequence.blocks.push_back(allocate().value());
  forget_waiting(candidate);
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
