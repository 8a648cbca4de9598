#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/sampling/step.h"
#include "scheduler/sample_queue.h"
#include "worker/replies.h"
#include "worker/stop_matcher.h"
#include "worker/token_table.h"
#include "worker/versions.h"
#include "worker_protocol/messages.h"

namespace ht::worker {

struct SampleOptions {
  scheduler::SampleLimits limits;
  std::int32_t max_seq_len = 0;
};

// The sampling lane: requests, their stops, and their results as they grow.
class SampleExecutor {
 public:
  SampleExecutor(const engine::BaseModel& model, Versions& versions, SampleOptions options, Send send);

  void push(worker_protocol::Request request);
  // Fails the request as cancelled. False: it is not here.
  bool cancel(worker_protocol::RequestId id);
  // Null: there is none. Samples with stop strings wait for this call.
  void set_token_table(std::shared_ptr<const TokenTable> table);

  bool ready() const { return queue_.ready(); }
  // One decode step with prefill chunks.
  void run_slice();

  std::uint64_t tokens() const { return tokens_; }
  const scheduler::SampleQueue& queue() const { return queue_; }
  std::uint64_t steps() const { return steps_; }

 private:
  struct Active {
    worker_protocol::Sample request;
    Versions::Weights weights;  // from its first step on; null: the base model
    std::shared_ptr<const TokenTable> token_table;
    std::int32_t max_tokens = 0;
    std::int32_t logprob_begin = 0;     // first row whose next token's logprob is asked for
    std::int32_t target_begin = 0;      // first row with targets or alternative tokens
    std::vector<StopMatcher> matchers;  // [num_samples]
    std::int32_t unfinished = 0;
    bool started = false;
    worker_protocol::SampleResult result;

    std::int32_t prompt_size() const { return static_cast<std::int32_t>(request.prompt.size()); }
    std::int32_t score_begin() const { return std::min(logprob_begin, target_begin); }
  };
  using Draws = std::vector<std::vector<scheduler::SampleDraw>>;

  void start(worker_protocol::RequestId id, worker_protocol::Sample request);
  void check(const worker_protocol::Sample& request) const;
  engine::StepRow step_row(const scheduler::SampleRow& row, const Active& active,
                           std::vector<engine::Draw>& draws) const;
  void take_scores(const scheduler::SampleRow& row, const engine::Score& score, engine::StepRowResult& result,
                   Active& active) const;
  bool take_draw(std::int32_t sample, const engine::DrawResult& draw, Active& active) const;
  void advance(const scheduler::SampleStep& step);
  void fail(worker_protocol::RequestId id, worker_protocol::Failure failure);
  scheduler::SampleStart may_start(worker_protocol::RequestId id);
  void loaded(const std::string& version, const Error* error);

  const engine::BaseModel& model_;
  Versions& versions_;
  const SampleOptions options_;
  const Send send_;
  engine::SamplingEngine engine_;
  scheduler::SampleQueue queue_;
  std::optional<std::shared_ptr<const TokenTable>> token_table_;  // not known yet, none, or the table
  std::vector<worker_protocol::Request> without_table_;           // samples that wait for it
  std::map<worker_protocol::RequestId, Active> active_;
  std::set<std::string> loading_;  // versions that the file thread reads
  std::uint64_t steps_ = 0;
  std::uint64_t tokens_ = 0;
};

}  // namespace ht::worker
