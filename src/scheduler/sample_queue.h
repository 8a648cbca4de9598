#pragma once

// Continuous batching over a paged cache: which sequences run in the next step, and in which blocks their keys and
// values lie.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "scheduler/block_allocator.h"
#include "scheduler/prefix_cache.h"

namespace ht::scheduler {

using RequestId = std::uint64_t;

struct SampleLimits {
  std::int32_t num_blocks = 0;
  std::int32_t block_size = 16;             // positions
  std::int32_t max_sequences = 64;          // decode rows of a step
  std::int32_t prefill_chunk_tokens = 512;  // prompt tokens of a step
};

struct SampleRequest {
  RequestId id = 0;
  std::string owner;                 // owners share the step's rows evenly; within one, older requests go first
  std::string version;               // whose keys and values: prompts are shared within a version only
  std::vector<std::int32_t> prompt;  // >= 1 token
  std::int32_t num_samples = 1;
  std::int32_t max_tokens = 1;
  std::int32_t score_begin = -1;  // rows from here on are computed even if cached; -1: nothing is scored
};

// A running sequence: sample -1 is a prompt before its samples part.
struct SequenceKey {
  std::uint64_t arrival = 0;
  std::int32_t sample = -1;

  auto operator<=>(const SequenceKey&) const = default;
};

struct SampleRow {
  SequenceKey sequence;
  RequestId request = 0;
  std::vector<std::int32_t> tokens;  // inputs at positions [position, position + tokens.size())
  std::int32_t position = 0;
  std::vector<std::int32_t> block_table;  // covers position + tokens.size() positions
  std::vector<std::int32_t> draws;        // samples that get a token from the last position
  bool is_prompt = false;                 // the request's own prompt: this is when it is scored
};

struct BlockCopy {
  BlockId from = 0;
  BlockId to = 0;
};

struct SampleStep {
  std::vector<BlockCopy> copies;  // in this order, before the rows
  std::vector<SampleRow> rows;    // rows of one version are adjacent
};

struct SampleDraw {
  std::int32_t token = 0;
  bool finished = false;  // the sample ends with this token
};

// What is said of a request that could start now.
enum class SampleStart {
  now,
  later,     // ask again after the next step
  released,  // ask again after release(); until then no request of its version is asked for
};

class SampleQueue {
 public:
  // `may_start` is asked about a request, once there is room for it, before its first row; none: all may.
  explicit SampleQueue(const SampleLimits& limits, std::function<SampleStart(RequestId)> may_start = {});

  // Throws Error(user) naming the limit when the request could not run even alone.
  void push(SampleRequest request);
  // Forgets the request and frees its blocks. Not between next_step() and complete(). False: it is not here.
  bool cancel(RequestId id);
  void drop_version(const std::string& version) { cache_.drop_version(version); }

  // Empty when nothing is to run. Each step must be completed before the next one is asked for.
  SampleStep next_step();
  // draws[i]: one for each of step.rows[i].draws. Rows of requests that were cancelled since next_step() are passed
  // over: what failed is cancelled first, so that none of its blocks gets into the prefix cache.
  void complete(const SampleStep& step, std::span<const std::vector<SampleDraw>> draws);

  void release() { held_.clear(); }

  // False also when everything waits for release().
  bool ready() const;
  std::int32_t num_running() const { return static_cast<std::int32_t>(running_.size()); }
  std::int32_t num_waiting() const { return static_cast<std::int32_t>(waiting_.size()); }
  // Positions that the whole cache holds. The last token of a sequence takes none.
  std::int64_t capacity() const { return std::int64_t{limits_.num_blocks} * limits_.block_size; }
  std::int32_t num_blocks() const { return allocator_.num_blocks(); }
  // Free, or held by the prefix cache alone.
  std::int32_t num_free_blocks() const { return allocator_.num_free() + cache_.num_evictable(); }
  std::uint64_t num_preemptions() const { return num_preemptions_; }

 private:
  struct Sequence {
    std::shared_ptr<const SampleRequest> request;
    std::vector<std::int32_t> generated;
    std::int32_t computed = 0;  // positions in the cache
    std::vector<BlockId> blocks;
    bool decoding = false;           // all but the last token are in the cache
    PrefixCache::NodeId node = 0;    // of the last prompt block that is in the prefix cache
    std::int32_t cached_blocks = 0;  // prompt blocks up to `node`

    std::int32_t size() const { return static_cast<std::int32_t>(request->prompt.size() + generated.size()); }
    std::int32_t token(std::int32_t position) const;
  };
  using Sequences = std::map<SequenceKey, Sequence>;

  std::int32_t blocks_for(std::int64_t positions) const;
  void release_blocks(Sequence& sequence);
  std::optional<BlockId> allocate();
  bool make_room(Sequences::iterator sequence, SampleStep& step);
  void add_waiting(const SequenceKey& key, Sequence sequence);
  void forget_waiting(Sequences::iterator entry);
  void preempt(Sequences::iterator sequence);
  std::map<std::string, std::int32_t> running_of_owners() const;
  std::vector<SequenceKey> decode_order() const;
  Sequences::iterator victim(const std::set<SequenceKey>& kept);
  void add_decode_rows(SampleStep& step);
  void add_prefill_rows(SampleStep& step);
  void admit_waiting(std::int32_t budget, SampleStep& step);
  // deferred: its prefix is being computed by another, or it may not start yet
  enum class Admission { admitted, deferred, no_room };
  Admission admit(Sequences::iterator candidate);
  std::int32_t reusable_positions(const Sequence& sequence) const;
  bool prefix_in_flight(const Sequence& candidate) const;
  std::vector<BlockId> find_prefix(Sequence& sequence);
  void add_row(const SequenceKey& key, const Sequence& sequence, std::int32_t tokens, SampleStep& step) const;
  void cache_prompt_blocks(Sequence& sequence);
  void part(Sequences::iterator prompt, const std::vector<std::int32_t>& samples, const std::vector<SampleDraw>& draws);

  SampleLimits limits_;
  BlockAllocator allocator_;
  PrefixCache cache_;
  const std::function<SampleStart(RequestId)> may_start_;
  Sequences waiting_;  // without blocks
  Sequences running_;
  std::map<std::string, std::set<SequenceKey>> waiting_of_;  // owner → its sequences in waiting_; no empty ones
  std::set<std::string> held_;                               // versions that wait for release()
  std::map<RequestId, std::uint64_t> arrival_of_;
  std::uint64_t next_arrival_ = 1;
  std::uint64_t num_preemptions_ = 0;
};

}  // namespace ht::scheduler
