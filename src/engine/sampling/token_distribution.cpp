#include "engine/sampling/token_distribution.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/philox.h"
#include "kernels/cpu/decode_kernels.h"

namespace ht::engine {

namespace {

constexpr int kBuckets = 1024;
// Logits (over the temperature) further than this below the best share the last bucket.
constexpr float kBucketRange = 32.0f;

// The kernel's exp does not go below the smallest normal float: a logit of -infinity has that weight.
constexpr float kNoWeight = 2e-38f;

bool better(const std::pair<float, std::int32_t>& a, const std::pair<float, std::int32_t>& b) {
  return a.first != b.first ? a.first > b.first : a.second < b.second;
}

}  // namespace

double draw_unit(std::uint64_t seed, std::int32_t position, std::int32_t index, DrawStream stream) {
  const auto words = philox4x32(
      {static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(stream), 0},
      seed);
  const std::uint64_t bits = (std::uint64_t{words[0]} << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

TokenDistribution::TokenDistribution(std::span<const float> logits, float temperature, std::int32_t top_k, float top_p)
    : logits_(logits) {
  const auto size = static_cast<std::int64_t>(logits.size());
  max_ = ht_row_max(logits.data(), size);
  finite_ = std::isfinite(max_);
  if (!finite_) return;
  // A temperature too small for its inverse to be a float is greedy.
  greedy_ = !(temperature > 0) || !std::isfinite(1.0f / temperature);
  inverse_temperature_ = greedy_ ? 1.0f : 1.0f / temperature;
  block_sums_.resize((logits.size() + HT_SUM_BLOCK - 1) / HT_SUM_BLOCK);
  total_ = ht_row_exp_sums(logits.data(), size, max_, inverse_temperature_, block_sums_.data());
  log_total_ = std::log(total_);

  const bool cut_k = top_k > 0 && top_k < size;
  const bool cut_p = top_p < 1.0f;
  truncated_ = !greedy_ && (cut_k || cut_p);
  if (!truncated_) return;
  std::vector<Candidate> candidates = cut_k ? best(top_k, 1.0) : best(size, top_p);
  if (cut_k) candidates.resize(static_cast<std::size_t>(top_k));
  std::vector<double> weights(candidates.size());
  double left = 0;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    weights[i] = std::exp(double{candidates[i].first - max_} * inverse_temperature_);
    left += weights[i];
  }
  const double limit = cut_p ? double{top_p} * (cut_k ? left : total_) : std::numeric_limits<double>::infinity();
  double cumulative = 0;
  for (std::size_t i = 0; i < candidates.size() && (i == 0 || cumulative < limit); ++i) {
    cumulative += weights[i];
    kept_.push_back(candidates[i].second);
    kept_cumulative_.push_back(cumulative);
  }
}

std::vector<TokenDistribution::Candidate> TokenDistribution::best(std::int64_t count, double share) const {
  // Buckets of logits, best first, tell how far down to look; only what lies above is gathered and sorted.
  const float scale = inverse_temperature_ * (kBuckets / kBucketRange);
  const auto bucket_of = [&](float logit) {
    const float place = (max_ - logit) * scale;
    return place < kBuckets - 1 ? static_cast<int>(place) : kBuckets - 1;
  };
  std::array<std::int32_t, kBuckets> counts{};
  std::array<double, kBuckets> masses{};
  for (const float logit : logits_) ++counts[static_cast<std::size_t>(bucket_of(logit))];
  if (share < 1.0) {
    std::array<float, HT_SUM_BLOCK> weights;
    for (std::size_t begin = 0; begin < logits_.size(); begin += HT_SUM_BLOCK) {
      const std::size_t block = std::min<std::size_t>(HT_SUM_BLOCK, logits_.size() - begin);
      ht_row_exp(&logits_[begin], static_cast<std::int64_t>(block), max_, inverse_temperature_, weights.data());
      for (std::size_t i = 0; i < block; ++i) {
        masses[static_cast<std::size_t>(bucket_of(logits_[begin + i]))] += weights[i];
      }
    }
  }
  int last = 0;
  std::int64_t counted = counts[0];
  double mass = masses[0];
  // The margin covers sums that were rounded in another order.
  const double wanted = share < 1.0 ? share * total_ * (1 + 1e-6) : std::numeric_limits<double>::infinity();
  while (last + 1 < kBuckets && counted < count && mass < wanted) {
    ++last;
    counted += counts[static_cast<std::size_t>(last)];
    mass += masses[static_cast<std::size_t>(last)];
  }
  std::vector<Candidate> found;
  found.reserve(static_cast<std::size_t>(counted));
  for (std::size_t i = 0; i < logits_.size(); ++i) {
    if (bucket_of(logits_[i]) <= last) found.emplace_back(logits_[i], static_cast<std::int32_t>(i));
  }
  if (count < static_cast<std::int64_t>(found.size())) {
    std::partial_sort(found.begin(), found.begin() + count, found.end(), better);
  } else {
    std::sort(found.begin(), found.end(), better);
  }
  return found;
}

std::int32_t TokenDistribution::draw(double unit) const {
  if (greedy_) {
    return static_cast<std::int32_t>(std::find(logits_.begin(), logits_.end(), max_) - logits_.begin());
  }
  if (truncated_) {
    const double wanted = unit * kept_cumulative_.back();
    const auto found = std::upper_bound(kept_cumulative_.begin(), kept_cumulative_.end() - 1, wanted);
    return kept_[static_cast<std::size_t>(found - kept_cumulative_.begin())];
  }
  double wanted = unit * total_;
  std::size_t block = 0;
  while (block + 1 < block_sums_.size() && wanted >= block_sums_[block]) wanted -= block_sums_[block++];
  const std::size_t begin = block * HT_SUM_BLOCK;
  const std::size_t size = std::min<std::size_t>(HT_SUM_BLOCK, logits_.size() - begin);
  std::array<float, HT_SUM_BLOCK> weights;
  ht_row_exp(&logits_[begin], static_cast<std::int64_t>(size), max_, inverse_temperature_, weights.data());
  double cumulative = 0;
  std::size_t token = 0;  // the last that has weight: rounding may leave `wanted` just above the block's sum
  for (std::size_t i = 0; i < size && cumulative <= wanted; ++i) {
    if (weights[i] < kNoWeight) continue;
    cumulative += weights[i];
    token = i;
  }
  return static_cast<std::int32_t>(begin + token);
}

float TokenDistribution::logprob(std::int32_t token) const {
  const double centred = double{logits_[static_cast<std::size_t>(token)]} - double{max_};
  return static_cast<float>(centred * inverse_temperature_ - log_total_);
}

void TokenDistribution::top(std::int32_t k, std::int32_t* token_ids, float* logprobs) const {
  const std::int64_t found = std::min<std::int64_t>(k, static_cast<std::int64_t>(logits_.size()));
  const std::vector<Candidate> top = best(found, 1.0);
  for (std::int64_t i = 0; i < k; ++i) {
    token_ids[i] = i < found ? top[static_cast<std::size_t>(i)].second : 0;
    logprobs[i] = i < found ? logprob(token_ids[i]) : -99999.0f;
  }
}

}  // namespace ht::engine
