#include "server/tinker_api/decode_sample.h"

#include <algorithm>

#include "base/error.h"
#include "server/tinker_api/tensor.h"

namespace ht::tinker_api {
namespace {

using worker_protocol::Sample;
using worker_protocol::SamplingParams;

std::vector<std::int32_t> prompt_tokens(const Fields& body, const ServedModel& model) {
  const Fields prompt = body.object("prompt");
  const json::value& chunks = prompt.get("chunks");
  if (!chunks.is_array()) throw user_error("prompt.chunks must be a list, got " + shown(chunks));
  std::vector<std::int32_t> tokens;
  for (const json::value& value : chunks.get_array()) {
    if (!value.is_object()) throw user_error("prompt.chunks holds objects, got " + shown(value));
    const Fields chunk(value.get_object(), "prompt.chunks.");
    const std::string type = chunk.optional_text("type").value_or("encoded_text");
    if (type == "image" || type == "image_asset_pointer") {
      throw user_error("image chunks are not supported by this model");
    }
    if (type == "dmel") throw user_error("audio (dmel) chunks are not supported by this model");
    if (type != "encoded_text")
      throw user_error("prompt chunk type \"" + type + "\" is unknown; allowed: encoded_text");
    append_int32(chunk.get("tokens"), "prompt token", 0, model.spec.vocab_size - 1, tokens);
  }
  if (tokens.empty()) throw user_error("the prompt is empty: at least one token is needed");
  return tokens;
}

std::string checked_stop(const json::string& text, const Limits& limits) {
  if (text.empty()) throw user_error("sampling_params.stop holds an empty string");
  if (text.size() > limits.max_stop_bytes) {
    throw user_error("a stop string has " + std::to_string(text.size()) + " bytes; at most " +
                     std::to_string(limits.max_stop_bytes) + " are allowed");
  }
  return std::string(text);
}

void decode_stop(const Fields& fields, const ServedModel& model, const Limits& limits, SamplingParams& params) {
  const json::value* stop = fields.find("stop");
  if (!stop) return;
  if (stop->is_string()) {
    params.stop_strings.push_back(checked_stop(stop->get_string(), limits));
    return;
  }
  if (!stop->is_array()) {
    throw user_error("sampling_params.stop must be a string, a list of strings or a list of token ids, got " +
                     shown(*stop));
  }
  const json::array& list = stop->get_array();
  // An explicitly empty list turns every stop off, the end-of-text token included.
  if (list.empty()) params.stop_on_eos = false;
  if (list.size() > static_cast<std::size_t>(limits.max_stops)) {
    throw user_error("sampling_params.stop has " + std::to_string(list.size()) + " entries; at most " +
                     std::to_string(limits.max_stops) + " are allowed");
  }
  if (!list.empty() && !list.front().is_string()) {
    append_int32(*stop, "sampling_params.stop", 0, model.spec.vocab_size - 1, params.stop_tokens);
    return;
  }
  for (const json::value& value : list) {
    if (!value.is_string()) {
      throw user_error("sampling_params.stop mixes strings and " + shown(value) +
                       "; allowed: all strings or all token ids");
    }
    params.stop_strings.push_back(checked_stop(value.get_string(), limits));
  }
}

std::uint64_t seed_of(const Fields& fields, std::uint64_t drawn) {
  const json::value* seed = fields.find("seed");
  if (!seed) return drawn;
  if (seed->is_uint64()) return seed->get_uint64();
  return static_cast<std::uint64_t>(fields.integer("seed"));
}

SamplingParams decode_params(const Fields& body, const ServedModel& model, const Limits& limits,
                             std::int64_t prompt_length, std::uint64_t drawn_seed) {
  const Fields fields = body.object("sampling_params");
  SamplingParams params;
  // One token after a prompt that fills the context is sampled, but never fed: scoring takes whole contexts.
  const std::int64_t left = std::max<std::int64_t>(model.max_seq_len - prompt_length, 1);
  const std::optional<std::int64_t> max_tokens = fields.optional_integer("max_tokens");
  if (max_tokens && *max_tokens < 1) {
    throw user_error("sampling_params.max_tokens = " + std::to_string(*max_tokens) + " must be at least 1");
  }
  if (prompt_length > model.max_seq_len || max_tokens.value_or(1) > left) {
    throw user_error("PromptTooLong: the prompt has " + std::to_string(prompt_length) + " tokens and max_tokens is " +
                     (max_tokens ? std::to_string(*max_tokens) : "not set (at least 1)") + "; the context of " +
                     model.names.front() + " is " + std::to_string(model.max_seq_len) + " tokens for both together");
  }
  params.max_tokens = static_cast<std::int32_t>(max_tokens.value_or(0));
  params.seed = seed_of(fields, drawn_seed);
  const double temperature = fields.number("temperature", 1.0);
  if (temperature < 0 || temperature > 1e6) {
    throw user_error("sampling_params.temperature = " + std::to_string(temperature) +
                     " is outside [0, 1000000]; 0 means greedy");
  }
  params.temperature = static_cast<float>(temperature);
  const double top_p = fields.number("top_p", 1.0);
  if (!(top_p > 0 && top_p <= 1)) {
    throw user_error("sampling_params.top_p = " + std::to_string(top_p) + " is outside (0, 1]");
  }
  params.top_p = static_cast<float>(top_p);
  const std::int64_t top_k = fields.bounded("top_k", -1, -1, INT32_MAX);
  if (top_k == 0) throw user_error("sampling_params.top_k = 0; allowed: -1 (off) or at least 1");
  params.top_k = static_cast<std::int32_t>(top_k);
  decode_stop(fields, model, limits, params);
  return params;
}

// What a request may return at its worst must fit into memory and into one message of the worker.
void check_cells(const Sample& work, const ServedModel& model, const Limits& limits) {
  const auto length = static_cast<std::int64_t>(work.prompt.size());
  const std::int64_t max_tokens =
      work.params.max_tokens > 0 ? work.params.max_tokens : std::max<std::int64_t>(model.max_seq_len - length, 1);
  const std::int64_t per_prompt_token =
      std::int64_t{work.prompt_logprobs} + work.topk_prompt_logprobs + work.target_width + work.prompt_alt_tokens_k;
  const std::int64_t cells =
      length * per_prompt_token + work.num_samples * max_tokens * (1 + std::int64_t{work.topk_sample_logprobs});
  if (cells <= limits.max_result_cells) return;
  throw user_error(
      "the request may return " + std::to_string(cells) + " tokens with logprobs, at most " +
      std::to_string(limits.max_result_cells) + " are allowed: num_samples = " + std::to_string(work.num_samples) +
      " times max_tokens = " + std::to_string(max_tokens) +
      (work.params.max_tokens > 0 ? "" : " (the rest of the context)") +
      " times 1 + topk_sample_logprobs = " + std::to_string(work.topk_sample_logprobs) + ", and for each of " +
      std::to_string(length) + " prompt tokens topk_prompt_logprobs = " + std::to_string(work.topk_prompt_logprobs) +
      ", target_prompt_logprobs' width = " + std::to_string(work.target_width) +
      " and prompt_alt_tokens_k = " + std::to_string(work.prompt_alt_tokens_k));
}

void decode_targets(const Fields& body, const ServedModel& model, const Limits& limits, DecodedSample& out) {
  const json::object* object = body.optional_object("target_prompt_logprobs");
  if (!object) return;
  const std::string name = "target_prompt_logprobs";
  const Fields tensor(*object, name + ".");
  const auto rows = static_cast<std::int64_t>(out.work.prompt.size()) - 1;
  const std::string wanted =
      "(" + std::to_string(rows) + ", K) for a prompt of " + std::to_string(rows + 1) + " tokens";
  const std::string dtype = tensor.optional_text("dtype").value_or("int64");
  if (dtype != "int64" && dtype != "int32") {
    throw user_error(name + " has dtype \"" + dtype + "\"; it holds token ids: int64");
  }
  if (!tensor.find("shape")) throw user_error(name + " has no shape; it must be " + wanted);
  const std::vector<std::int64_t> shape = integers(*tensor.find("shape"), name + ".shape", 0, INT32_MAX);
  if (shape.size() != 2 || shape[0] != rows || shape[1] < 1 || shape[1] > limits.max_target_width) {
    std::string got;
    for (const std::int64_t extent : shape) got += (got.empty() ? "" : ", ") + std::to_string(extent);
    throw user_error(name + " has shape (" + got + "); it must be " + wanted + " with K from 1 to " +
                     std::to_string(limits.max_target_width));
  }
  const std::int64_t cols = shape[1];
  if (rows * cols > limits.max_target_cells) {
    throw user_error(name + " has " + std::to_string(rows * cols) + " cells; at most " +
                     std::to_string(limits.max_target_cells) + " are allowed");
  }
  out.work.target_width = static_cast<std::int32_t>(cols);
  std::vector<std::int32_t> values;
  const json::value* crow = tensor.find("sparse_crow_indices");
  const json::value* col = tensor.find("sparse_col_indices");
  if (!crow && !col) {
    append_int32(tensor.get("data"), name, -1, model.spec.vocab_size - 1, values);
    if (static_cast<std::int64_t>(values.size()) != rows * cols) {
      throw user_error(name + " of shape (" + std::to_string(rows) + ", " + std::to_string(cols) + ") has " +
                       std::to_string(values.size()) + " values");
    }
    out.work.prompt_targets = std::move(values);
    return;
  }
  out.sparse_targets = true;
  append_int32(tensor.get("data"), name, 0, model.spec.vocab_size - 1, values);
  const std::vector<std::int64_t> crow_indices =
      integers(tensor.get("sparse_crow_indices"), name + ".sparse_crow_indices", 0, INT32_MAX);
  const std::vector<std::int64_t> col_indices =
      integers(tensor.get("sparse_col_indices"), name + ".sparse_col_indices", 0, INT32_MAX);
  check_csr(name, rows, cols, static_cast<std::int64_t>(values.size()), crow_indices, col_indices);
  out.work.prompt_targets.assign(static_cast<std::size_t>(rows * cols), -1);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = crow_indices[row]; i < crow_indices[row + 1]; ++i) {
      out.work.prompt_targets[static_cast<std::size_t>(row * cols + col_indices[i])] = values[i];
    }
  }
}

}  // namespace

DecodedSample decode_sample(const json::object& object, const ServedModel& model, const Limits& limits,
                            std::uint64_t drawn_seed) {
  const Fields body(object);
  DecodedSample out;
  Sample& work = out.work;
  work.num_samples = static_cast<std::int32_t>(body.bounded("num_samples", 1, 1, limits.max_num_samples));
  work.prompt = prompt_tokens(body, model);
  const auto length = static_cast<std::int64_t>(work.prompt.size());
  work.params = decode_params(body, model, limits, length, drawn_seed);
  const std::int64_t max_topk = std::min<std::int64_t>(limits.max_topk, model.spec.vocab_size);
  work.prompt_logprobs = body.boolean("prompt_logprobs", false);
  work.topk_prompt_logprobs = static_cast<std::int32_t>(body.bounded("topk_prompt_logprobs", 0, 0, max_topk));
  work.topk_sample_logprobs = static_cast<std::int32_t>(body.bounded("topk_sample_logprobs", 0, 0, max_topk));
  work.prompt_alt_tokens_k = static_cast<std::int32_t>(body.bounded("prompt_alt_tokens_k", 0, 0, limits.max_topk));
  if (const auto last_n = body.optional_integer("prompt_logprobs_last_n")) {
    if (*last_n < 1 || *last_n > length - 1) {
      throw user_error("prompt_logprobs_last_n = " + std::to_string(*last_n) + " is outside [1, " +
                       std::to_string(length - 1) + "] for a prompt of " + std::to_string(length) + " tokens");
    }
    if (!work.prompt_logprobs) throw user_error("prompt_logprobs_last_n needs prompt_logprobs to be true");
    work.prompt_logprobs_last_n = static_cast<std::int32_t>(*last_n);
  }
  body.boolean("record_stability_info", false);
  decode_targets(body, model, limits, out);
  check_cells(work, model, limits);
  return out;
}

}  // namespace ht::tinker_api
