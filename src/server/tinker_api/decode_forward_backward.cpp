#include "server/tinker_api/decode_forward_backward.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/error.h"
#include "server/tinker_api/loss_config.h"
#include "server/tinker_api/spans.h"
#include "server/tinker_api/tensor.h"

namespace ht::tinker_api {
namespace {

using worker_protocol::LossSpec;
using worker_protocol::TrainBatch;

struct FloatInput {
  std::string_view name;
  std::vector<float> TrainBatch::*field;
};
constexpr std::array<FloatInput, 6> kFloatInputs = {{
    {"weights", &TrainBatch::weights},
    {"logprobs", &TrainBatch::logprobs},
    {"advantages", &TrainBatch::advantages},
    {"sequence_ratio_mask", &TrainBatch::sequence_ratio_mask},
    {"clip_low_threshold", &TrainBatch::clip_low_threshold},
    {"clip_high_threshold", &TrainBatch::clip_high_threshold},
}};

bool contains(const std::vector<std::string_view>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string joined(const LossSpec& spec) {
  std::string text = "target_tokens";
  for (const std::string_view name : spec.required_inputs) text += ", " + std::string(name);
  for (const std::string_view name : spec.optional_inputs) text += ", " + std::string(name) + " (optional)";
  return text;
}

// What a datum without the optional input means.
float absent_value(std::string_view name, const worker_protocol::LossConfig& config) {
  if (name == "weights") return 1.0f;
  if (name == "clip_low_threshold") return static_cast<float>(config.clip_low_threshold);
  if (name == "clip_high_threshold") return static_cast<float>(config.clip_high_threshold);
  return 0.0f;
}

class Decoder {
 public:
  Decoder(const tinker_public::ForwardBackwardRequest& request, const ServedModel& model, const Limits& limits)
      : request_(request), model_(model), limits_(limits), spec_(requested_loss(request)) {
    out_.work.adapter = request.model_id();
    out_.work.loss = spec_.kind;
    out_.work.config = requested_loss_config(request, spec_);
    out_.work.forward_only = request.forward_only();
  }

  DecodedForwardBackward run() {
    const int num_datums = request_.data_size();
    if (num_datums == 0) throw user_error("data is empty: at least one datum is needed");
    if (static_cast<std::size_t>(num_datums) > limits_.max_datums) {
      throw user_error("data has " + std::to_string(num_datums) + " datums; at most " +
                       std::to_string(limits_.max_datums) + " are allowed");
    }
    reserve();
    batch().cu_seqlens.push_back(0);
    for (int i = 0; i < num_datums; ++i) add(request_.data(i), "datum " + std::to_string(i));
    return std::move(out_);
  }

 private:
  TrainBatch& batch() { return out_.work.batch; }

  void reserve() {
    std::size_t bytes = 0;
    for (const tinker_public::Datum& datum : request_.data()) {
      for (const tinker_public::Chunk& chunk : datum.model_input()) bytes += chunk.encoded_text().tokens().size();
    }
    batch().tokens.reserve(bytes / 4);
    batch().targets.reserve(bytes / 4);
    batch().cu_seqlens.reserve(static_cast<std::size_t>(request_.data_size()) + 1);
    batch().target_width.reserve(static_cast<std::size_t>(request_.data_size()));
    out_.shapes.reserve(static_cast<std::size_t>(request_.data_size()));
  }

  void check_known(const std::string& key, const std::string& name) const {
    if (key == "target_tokens" || contains(spec_.required_inputs, key) || contains(spec_.optional_inputs, key)) return;
    throw user_error(name + ": input \"" + key + "\" is unknown to loss " + std::string(spec_.name) + "; it takes " +
                     joined(spec_));
  }

  void add(const tinker_public::Datum& datum, const std::string& name) {
    const std::int64_t length = add_tokens(datum, name);
    const TargetShape shape = add_targets(datum, name, length);
    for (const auto& [key, tensor] : datum.loss_fn_inputs()) check_known(key, name);
    for (const FloatInput& input : kFloatInputs) add_floats(datum, name, input, shape);
    if (spec_.requires_spans) check_spans(datum, name, length, std::string(spec_.name));
  }

  std::int64_t add_tokens(const tinker_public::Datum& datum, const std::string& name) {
    std::vector<std::int32_t>& tokens = batch().tokens;
    const std::size_t begin = tokens.size();
    for (const tinker_public::Chunk& chunk : datum.model_input()) {
      switch (chunk.chunk_case()) {
        case tinker_public::Chunk::kEncodedText:
          break;
        case tinker_public::Chunk::kImage:
          throw user_error(name + ": image chunks are not supported by this model");
        case tinker_public::Chunk::kDmel:
          throw user_error(name + ": audio (dmel) chunks are not supported by this model");
        default:
          throw user_error(name + ": model_input has a chunk of unknown kind; allowed: encoded_text");
      }
      const std::string& bytes = chunk.encoded_text().tokens();
      if (bytes.size() % 4 != 0) {
        throw user_error(name + ": encoded_text has " + std::to_string(bytes.size()) +
                         " bytes, which are no whole number of int32 tokens");
      }
      if (bytes.empty()) continue;
      const std::size_t at = tokens.size();
      tokens.resize(at + bytes.size() / 4);
      std::memcpy(tokens.data() + at, bytes.data(), bytes.size());
    }
    const std::size_t length = tokens.size() - begin;
    if (length == 0) throw user_error(name + " is empty: its model_input has no tokens");
    if (length > static_cast<std::size_t>(model_.max_seq_len)) {
      throw user_error(name + " has " + std::to_string(length) + " tokens; the context of " + model_.names.front() +
                       " is at most " + std::to_string(model_.max_seq_len));
    }
    for (std::size_t i = begin; i < tokens.size(); ++i) {
      if (tokens[i] < 0 || tokens[i] >= model_.spec.vocab_size) {
        throw user_error(name + ": model_input token [" + std::to_string(i - begin) +
                         "] = " + std::to_string(tokens[i]) + " is outside the vocabulary [0, " +
                         std::to_string(model_.spec.vocab_size) + ")");
      }
    }
    // Positions are int32 on the worker's wire.
    if (tokens.size() > static_cast<std::size_t>(limits_.max_target_cells)) {
      throw user_error("data has more than " + std::to_string(limits_.max_target_cells) + " tokens in one request");
    }
    batch().cu_seqlens.push_back(static_cast<std::int32_t>(tokens.size()));
    return static_cast<std::int64_t>(length);
  }

  TargetShape add_targets(const tinker_public::Datum& datum, const std::string& name, std::int64_t length) {
    const auto found = datum.loss_fn_inputs().find("target_tokens");
    if (found == datum.loss_fn_inputs().end()) {
      throw user_error(name + ": input \"target_tokens\" is missing; loss " + std::string(spec_.name) + " takes " +
                       joined(spec_));
    }
    const TensorView view = view_tensor(found->second, name + ": target_tokens", limits_.max_target_cells);
    if (view.rows != length) {
      throw user_error(name + ": target_tokens has shape " + view.shape() + " but model_input has " +
                       std::to_string(length) + " tokens; the lengths must be equal");
    }
    if (view.cols >= 0) {
      if (!spec_.allows_2d_targets) {
        throw user_error(name + ": target_tokens has shape " + view.shape() + "; loss " + std::string(spec_.name) +
                         " takes one target a position, shape (" + std::to_string(length) + ")");
      }
      if (view.cols < 1 || view.cols > limits_.max_target_width) {
        throw user_error(name + ": target_tokens has " + std::to_string(view.cols) +
                         " targets a position; allowed: 1 to " + std::to_string(limits_.max_target_width));
      }
    }
    if (static_cast<std::int64_t>(batch().targets.size()) + view.cells() > limits_.max_target_cells) {
      throw user_error(name + ": the request has more than " + std::to_string(limits_.max_target_cells) + " targets");
    }
    append_tokens(view, model_.spec.vocab_size, batch().targets);
    const TargetShape shape{length, std::max<std::int64_t>(view.cols, 0)};
    batch().target_width.push_back(static_cast<std::int32_t>(std::max<std::int64_t>(view.cols, 1)));
    out_.shapes.push_back(shape);
    return shape;
  }

  void add_floats(const tinker_public::Datum& datum, const std::string& name, const FloatInput& input,
                  const TargetShape& shape) {
    std::vector<float>& values = batch().*input.field;
    const std::size_t end = batch().targets.size();
    const std::size_t begin = end - static_cast<std::size_t>(shape.n * std::max<std::int64_t>(shape.k, 1));
    const auto found = datum.loss_fn_inputs().find(std::string(input.name));
    if (found == datum.loss_fn_inputs().end()) {
      if (contains(spec_.required_inputs, input.name)) {
        throw user_error(name + ": input \"" + std::string(input.name) + "\" is missing; loss " +
                         std::string(spec_.name) + " takes " + joined(spec_));
      }
      // "Not given" is an empty array; once a datum has given it, the others need their default in it.
      if (!values.empty()) values.resize(end, absent_value(input.name, out_.work.config));
      return;
    }
    const TensorView view = view_tensor(found->second, name + ": " + std::string(input.name), limits_.max_target_cells);
    const bool same =
        view.rows == shape.n && std::max<std::int64_t>(view.cols, 1) == std::max<std::int64_t>(shape.k, 1);
    if (!same || (view.cols == 0)) {
      const std::string wanted =
          shape.k == 0 ? std::to_string(shape.n) : std::to_string(shape.n) + ", " + std::to_string(shape.k);
      throw user_error(view.name + " has shape " + view.shape() + "; it must have the shape of target_tokens, (" +
                       wanted + ")");
    }
    values.reserve(batch().targets.capacity());
    values.resize(begin, absent_value(input.name, out_.work.config));
    append_floats(view, values);
  }

  const tinker_public::ForwardBackwardRequest& request_;
  const ServedModel& model_;
  const Limits& limits_;
  const LossSpec& spec_;
  DecodedForwardBackward out_;
};

}  // namespace

std::unique_ptr<tinker_public::ForwardBackwardRequest> parse_forward_backward(std::string_view body) {
  // The library would write a line about each bad text of a client's to stderr.
  [[maybe_unused]] static const auto silenced = google::protobuf::SetLogHandler(nullptr);
  auto message = std::make_unique<tinker_public::ForwardBackwardRequest>();
  if (body.size() > static_cast<std::size_t>(INT32_MAX) ||
      !message->ParseFromArray(body.data(), static_cast<int>(body.size()))) {
    throw user_error("the body (" + std::to_string(body.size()) +
                     " bytes) is no ForwardBackwardRequest: it is truncated or damaged");
  }
  return message;
}

DecodedForwardBackward decode_forward_backward(const tinker_public::ForwardBackwardRequest& request,
                                               const ServedModel& model, const Limits& limits) {
  return Decoder(request, model, limits).run();
}

}  // namespace ht::tinker_api
