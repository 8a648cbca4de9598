#include "worker/backend_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/json.hpp>
#include <limits>

#include "base/error.h"

namespace ht::worker {

namespace json = boost::json;

namespace {

constexpr const char* kKeys =
    "micro_batch_tokens, recompute, prefill_chunk_tokens, max_sampling_sequences, kv_cache_tokens, adapter_bytes, "
    "sampling_share, device";

std::int64_t integer(const json::key_value_pair& pair, std::int64_t low, std::int64_t high) {
  boost::system::error_code error;
  const auto value = pair.value().to_number<std::int64_t>(error);
  if (error || value < low || value > high) {
    throw user_error(fmt::format("backend config: {} is {}, allowed are whole numbers from {} to {}",
                                 std::string(pair.key()), json::serialize(pair.value()), low, high));
  }
  return value;
}

engine::Recompute recompute(const json::value& value) {
  const std::string name = value.is_string() ? std::string(value.get_string()) : json::serialize(value);
  if (name == "none") return engine::Recompute::none;
  if (name == "norms_mlp") return engine::Recompute::norms_mlp;
  if (name == "block") return engine::Recompute::block;
  throw user_error("backend config: recompute is " + name + ", allowed are none, norms_mlp, block");
}

std::string device(const json::value& value) {
  const std::string name = value.is_string() ? std::string(value.get_string()) : json::serialize(value);
  if (name == "auto" || name == "cpu" || name == "cuda") return name;
  throw user_error("backend config: device is " + name + ", allowed are auto, cpu, cuda");
}

double share(const json::value& value) {
  boost::system::error_code error;
  const double number = value.to_number<double>(error);
  if (error || !(number >= 0.05 && number <= 0.95)) {
    throw user_error("backend config: sampling_share is " + json::serialize(value) +
                     ", allowed are numbers from 0.05 to 0.95");
  }
  return number;
}

}  // namespace

BackendConfig parse_backend_config(const std::string& text) {
  BackendConfig config;
  if (text.empty()) return config;
  boost::system::error_code error;
  const json::value value = json::parse(text, error);
  if (error || !value.is_object()) throw user_error("backend config: not a JSON object: " + text.substr(0, 200));
  constexpr std::int64_t kMaxInt = std::numeric_limits<std::int32_t>::max();
  for (const auto& pair : value.get_object()) {
    const std::string key(pair.key());
    if (key == "micro_batch_tokens") {
      config.micro_batch_tokens = static_cast<std::int32_t>(integer(pair, 1, kMaxInt));
    } else if (key == "recompute") {
      config.recompute = recompute(pair.value());
    } else if (key == "prefill_chunk_tokens") {
      config.prefill_chunk_tokens = static_cast<std::int32_t>(integer(pair, 1, 1 << 20));
    } else if (key == "max_sampling_sequences") {
      config.max_sampling_sequences = static_cast<std::int32_t>(integer(pair, 1, 1 << 16));
    } else if (key == "kv_cache_tokens") {
      config.kv_cache_tokens = integer(pair, kBlockSize, kMaxInt);
    } else if (key == "adapter_bytes") {
      config.adapter_bytes = static_cast<std::uint64_t>(integer(pair, 1, std::numeric_limits<std::int64_t>::max()));
    } else if (key == "device") {
      config.device = device(pair.value());
    } else if (key == "sampling_share") {
      config.sampling_share = share(pair.value());
    } else {
      throw user_error("backend config: unknown key " + key + ", allowed are " + kKeys);
    }
  }
  return config;
}

model_spec::MemoryPlan plan_memory(const model_spec::ModelSpec& spec, const BackendConfig& config,
                                   std::int32_t max_seq_len, bool copy_16_bits, std::uint64_t free_bytes) {
  model_spec::MemoryDemand demand;
  demand.micro_batch_tokens = config.micro_batch_tokens;
  demand.recompute = config.recompute;
  demand.copy_16_bits = copy_16_bits;
  demand.cache_tokens = config.kv_cache_tokens;
  demand.adapter_bytes = config.adapter_bytes;
  model_spec::divide_free_memory(spec, max_seq_len, free_bytes, demand);
  demand.cache_tokens = (demand.cache_tokens + kBlockSize - 1) / kBlockSize * kBlockSize;
  return model_spec::plan_memory(spec, demand, max_seq_len);
}

}  // namespace ht::worker
