#include "server/tinker_api/encode.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>

#include "base/error.h"
#include "tinker_public.pb.h"

namespace ht::tinker_api {
namespace {

using worker_protocol::Sample;
using worker_protocol::SampleResult;

template <typename T>
std::string bytes_of(const T* values, std::size_t count) {
  return std::string(reinterpret_cast<const char*>(values), count * sizeof(T));
}
template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  return bytes_of(values.data(), values.size());
}

void require(bool fits, const std::string& what, std::size_t got, std::size_t wanted) {
  if (!fits) {
    throw server_error("the worker answered " + std::to_string(got) + " " + what + " where " + std::to_string(wanted) +
                       " are due");
  }
}

std::string serialized(const google::protobuf::MessageLite& message) {
  std::string bytes;
  if (!message.SerializeToString(&bytes)) {
    throw server_error("the result is larger than a protobuf message may be (2 GiB)");
  }
  return bytes;
}

void set_topk(const worker_protocol::TopkLogprobs& topk, tinker_public::TopkLogprobs& out) {
  const auto k = static_cast<std::size_t>(topk.k);
  require(topk.token_ids.size() == topk.logprobs.size() && topk.token_ids.size() % k == 0, "top-k cells",
          topk.token_ids.size(), topk.logprobs.size());
  out.set_token_ids(bytes_of(topk.token_ids));
  out.set_logprobs(bytes_of(topk.logprobs));
  out.set_k(static_cast<std::uint32_t>(k));
  out.set_length(static_cast<std::uint32_t>(topk.token_ids.size() / k));
}

void set_matrix(tinker_public::Tensor& tensor, tinker_public::DType dtype, std::size_t rows, std::size_t cols,
                std::string bytes) {
  tensor.set_dense(std::move(bytes));
  tensor.set_dtype(dtype);
  tensor.add_shape(static_cast<std::int64_t>(rows));
  tensor.add_shape(static_cast<std::int64_t>(cols));
}

void set_targets(const SampleResult& result, const Sample& request, bool sparse, tinker_public::Tensor& tensor) {
  const std::vector<float>& logprobs = result.target_prompt_logprobs;
  require(logprobs.size() == request.prompt_targets.size(), "target logprobs", logprobs.size(),
          request.prompt_targets.size());
  const auto cols = static_cast<std::size_t>(request.target_width);
  const std::size_t rows = request.prompt.size() - 1;
  if (!sparse) {
    set_matrix(tensor, tinker_public::DTYPE_FLOAT32, rows, cols, bytes_of(logprobs));
    return;
  }
  std::vector<float> values;
  std::vector<std::int64_t> crow{0}, col;
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t j = 0; j < cols; ++j) {
      if (request.prompt_targets[row * cols + j] < 0) continue;
      values.push_back(logprobs[row * cols + j]);
      col.push_back(static_cast<std::int64_t>(j));
    }
    crow.push_back(static_cast<std::int64_t>(col.size()));
  }
  tinker_public::SparseCsr& csr = *tensor.mutable_sparse_csr();
  csr.set_values(bytes_of(values));
  csr.set_crow_indices(bytes_of(crow));
  csr.set_col_indices(bytes_of(col));
  tensor.set_dtype(tinker_public::DTYPE_FLOAT32);
  tensor.add_shape(static_cast<std::int64_t>(rows));
  tensor.add_shape(static_cast<std::int64_t>(cols));
}

// One ArrayRecord of datums [begin, end), which share their trailing shape.
void add_record(const std::vector<TargetShape>& shapes, std::size_t begin, std::size_t end, const float* logprobs,
                tinker_public::ForwardBackwardOutput& out) {
  std::vector<std::int64_t> offsets{0};
  for (std::size_t i = begin; i < end; ++i) {
    const std::int64_t values = shapes[i].n * std::max<std::int64_t>(shapes[i].k, 1);
    offsets.push_back(offsets.back() + values * static_cast<std::int64_t>(sizeof(float)));
  }
  tinker_public::ArrayRecord& record = *out.add_loss_fn_outputs();
  record.set_type_tag("ArrayRecord");
  record.set_num_datums(static_cast<std::int64_t>(end - begin));
  tinker_public::BatchedTensor& tensor = (*record.mutable_fields())["logprobs"];
  tensor.set_data(std::string(reinterpret_cast<const char*>(logprobs), static_cast<std::size_t>(offsets.back())));
  tensor.set_offsets(bytes_of(offsets));
  tensor.set_dtype(tinker_public::DTYPE_FLOAT32);
  if (shapes[begin].k > 0) tensor.add_trailing_shape(shapes[begin].k);
}

}  // namespace

std::string encode_forward_backward(const worker_protocol::TrainResult& result,
                                    const std::vector<TargetShape>& shapes) {
  std::size_t total = 0;
  for (const TargetShape& shape : shapes) {
    total += static_cast<std::size_t>(shape.n * std::max<std::int64_t>(shape.k, 1));
  }
  require(result.logprobs.size() == total, "logprobs", result.logprobs.size(), total);
  tinker_public::ForwardBackwardOutput out;
  out.set_loss_fn_output_type("ArrayRecord");
  const float* logprobs = result.logprobs.data();
  for (std::size_t begin = 0; begin < shapes.size();) {
    std::size_t end = begin;
    std::size_t values = 0;
    while (end < shapes.size() && shapes[end].k == shapes[begin].k) {
      values += static_cast<std::size_t>(shapes[end].n * std::max<std::int64_t>(shapes[end].k, 1));
      ++end;
    }
    add_record(shapes, begin, end, logprobs, out);
    logprobs += values;
    begin = end;
  }
  for (const auto& [name, value] : result.metrics) (*out.mutable_metrics())[name] = value;
  return serialized(out);
}

std::string encode_sample(const SampleResult& result, const Sample& request, bool sparse_targets) {
  require(result.sequences.size() == static_cast<std::size_t>(request.num_samples), "sequences",
          result.sequences.size(), static_cast<std::size_t>(request.num_samples));
  tinker_public::SampleResponse out;
  for (const worker_protocol::SampledSequence& sequence : result.sequences) {
    require(sequence.logprobs.size() == sequence.tokens.size(), "logprobs of sampled tokens", sequence.logprobs.size(),
            sequence.tokens.size());
    tinker_public::SampledSequence& to = *out.add_sequences();
    to.set_stop_reason(sequence.stop_reason == worker_protocol::StopReason::stop ? tinker_public::STOP_REASON_STOP
                                                                                 : tinker_public::STOP_REASON_LENGTH);
    to.set_tokens(bytes_of(sequence.tokens));
    to.set_logprobs(bytes_of(sequence.logprobs));
    if (request.topk_sample_logprobs > 0 && sequence.topk.k > 0) {
      set_topk(sequence.topk, *to.mutable_topk_sampled_logprobs());
    }
  }
  const std::size_t length = request.prompt.size();
  if (request.prompt_logprobs) {
    require(result.prompt_logprobs.size() == length, "prompt logprobs", result.prompt_logprobs.size(), length);
    std::vector<float> logprobs = result.prompt_logprobs;
    // The client raises when a position before the last n has a value; the first has no context at all.
    const auto last_n = static_cast<std::size_t>(request.prompt_logprobs_last_n);
    const std::size_t unscored = last_n == 0 ? 1 : length - last_n;
    std::fill_n(logprobs.begin(), unscored, std::nanf(""));
    out.set_prompt_logprobs(bytes_of(logprobs));
  }
  if (request.topk_prompt_logprobs > 0 && result.topk_prompt.k > 0) {
    set_topk(result.topk_prompt, *out.mutable_topk_prompt_logprobs());
  }
  out.set_prompt_cache_hit_tokens(result.prompt_cache_hit_tokens);
  if (request.target_width > 0) {
    set_targets(result, request, sparse_targets, *out.mutable_target_prompt_logprobs());
  }
  if (request.prompt_alt_tokens_k > 0) {
    const auto k = static_cast<std::size_t>(request.prompt_alt_tokens_k);
    const std::size_t cells = (length - 1) * k;
    require(result.prompt_alt_tokens.size() == cells, "alternative tokens", result.prompt_alt_tokens.size(), cells);
    require(result.prompt_alt_logprobs.size() == cells, "alternative logprobs", result.prompt_alt_logprobs.size(),
            cells);
    tinker_public::PromptAltTokens& alt = *out.mutable_prompt_alt_tokens();
    set_matrix(*alt.mutable_tokens(), tinker_public::DTYPE_INT32, length - 1, k, bytes_of(result.prompt_alt_tokens));
    set_matrix(*alt.mutable_logprobs(), tinker_public::DTYPE_FLOAT32, length - 1, k,
               bytes_of(result.prompt_alt_logprobs));
  }
  return serialized(out);
}

std::string encode_optim_step(const worker_protocol::OptimResult& result) {
  boost::json::object metrics;
  for (const auto& [name, value] : result.metrics) {
    if (std::isfinite(value)) metrics[name] = value;
  }
  return boost::json::serialize(boost::json::object{{"metrics", std::move(metrics)}});
}

std::string rfc3339(std::chrono::system_clock::time_point time) {
  const auto micros = std::chrono::floor<std::chrono::microseconds>(time.time_since_epoch()).count();
  const std::time_t seconds = static_cast<std::time_t>(micros >= 0 ? micros / 1000000 : (micros - 999999) / 1000000);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char text[32];
  const std::size_t length = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
  char fraction[16];
  std::snprintf(fraction, sizeof fraction, ".%06dZ",
                static_cast<int>(micros - static_cast<std::int64_t>(seconds) * 1000000));
  return std::string(text, length) + fraction;
}

}  // namespace ht::tinker_api
