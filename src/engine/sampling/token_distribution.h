#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace ht::engine {

// Which independent stream of random numbers a draw uses.
enum class DrawStream : std::uint32_t { sample = 0, alternative = 1 };

// Uniform in [0, 1) with 53 bits: a function of its arguments alone. Philox keyed by the seed, counter = (position of
// the drawn token in its sequence, index, stream, 0).
double draw_unit(std::uint64_t seed, std::int32_t position, std::int32_t index, DrawStream stream);

// One row of logits as a distribution over tokens: softmax(logits / temperature), restricted to the top_k tokens and
// then to the smallest set of the most probable ones whose share of what is left reaches top_p, as transformers'
// TopKLogitsWarper and TopPLogitsWarper in this order; ties go to the lower token. Temperature 0 is greedy.
class TokenDistribution {
 public:
  // `logits` must outlive this. top_k <= 0 and top_p >= 1 are off.
  TokenDistribution(std::span<const float> logits, float temperature, std::int32_t top_k = -1, float top_p = 1.0f);

  // False: a logit is NaN or the largest is infinite; nothing else may be called.
  bool finite() const { return finite_; }
  // The token at `unit` of the cumulative distribution; the greedy token at temperature 0.
  std::int32_t draw(double unit) const;
  // log-softmax of logits / temperature (temperature 0: of the logits), before top_k and top_p.
  float logprob(std::int32_t token) const;
  // The k most probable tokens, best first, with logprob(): token_ids [k], logprobs [k]. Cells beyond the vocabulary
  // are undefined cells of worker_protocol::TopkLogprobs.
  void top(std::int32_t k, std::int32_t* token_ids, float* logprobs) const;

 private:
  using Candidate = std::pair<float, std::int32_t>;  // logit, token

  // The `count` best tokens (at least as many, unless share stops it earlier), best first; or as many as make up
  // `share` of the whole.
  std::vector<Candidate> best(std::int64_t count, double share) const;

  std::span<const float> logits_;
  bool finite_ = false;
  bool greedy_ = false;
  bool truncated_ = false;
  float max_ = 0;
  float inverse_temperature_ = 1;
  double total_ = 0;  // sum of exp((logit - max) / temperature)
  double log_total_ = 0;
  std::vector<double> block_sums_;  // of HT_SUM_BLOCK tokens each
  std::vector<std::int32_t> kept_;  // what top_k and top_p leave, best first
  std::vector<double> kept_cumulative_;
};

}  // namespace ht::engine
