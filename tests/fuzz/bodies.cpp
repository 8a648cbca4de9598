// Bodies of the SDK's requests.

#include "base/error.h"
#include "server/tinker_api/body.h"
#include "server/tinker_api/decode_forward_backward.h"
#include "server/tinker_api/decode_sample.h"
#include "server/tinker_api/json_fields.h"
#include "server/tinker_api/lora_request.h"
#include "targets.h"

namespace ht::fuzz {

namespace api = tinker_api;

namespace {

api::ServedModel served_model() {
  api::ServedModel model;
  model.names = {"test/model"};
  model.base_dir = "/model";
  model.spec.vocab_size = 384;
  model.max_seq_len = 1024;
  return model;
}

// Small, so that an input that asks for much is refused rather than slow.
api::Limits limits() {
  api::Limits limits;
  limits.max_datums = 64;
  limits.max_target_cells = 1 << 16;
  limits.max_result_cells = 1 << 20;
  return limits;
}

void check(const worker_protocol::TrainBatch& batch, const api::ServedModel& model) {
  for (const std::int32_t token : batch.tokens) {
    require(token >= 0 && token < model.spec.vocab_size, "a token outside the vocabulary got through");
  }
  for (const std::int32_t target : batch.targets) {
    require(target >= 0 && target < model.spec.vocab_size, "a target outside the vocabulary got through");
  }
}

}  // namespace

void forward_backward(std::string_view input) {
  static const api::ServedModel model = served_model();
  const auto number = api::scan_protobuf_number(input);
  try {
    const auto message = api::parse_forward_backward(input);
    require(!number || !message->model_id().empty(), "a number without a model");
    const auto decoded = api::decode_forward_backward(*message, model, limits());
    require(decoded.shapes.size() == static_cast<std::size_t>(decoded.work.batch.num_datums()), "not a shape a datum");
    check(decoded.work.batch, model);
  } catch (const Error&) {
  }
}

void json_bodies(std::string_view input) {
  static const api::ServedModel model = served_model();
  api::scan_json_number(input);
  try {
    const auto body = api::parse_object(input);
    try {
      const auto decoded = api::decode_sample(body, model, limits(), 1);
      require(!decoded.work.prompt.empty(), "an empty prompt got through");
    } catch (const Error&) {
    }
    const api::Fields fields(body);
    const auto lora = api::decode_lora_config(fields);
    require(lora.rank >= 1 && lora.rank <= 256 && (lora.rank & (lora.rank - 1)) == 0, "a wrong rank got through");
    api::check_optimizer_config(fields);
  } catch (const Error&) {
  }
}

void zstd_bodies(std::string_view input) {
  constexpr std::size_t kMaxBytes = 1 << 20;
  const std::string head = api::decode_head("zstd", input, api::kNumberScanBytes);
  require(head.size() <= api::kNumberScanBytes, "a head is larger than its limit");
  api::scan_protobuf_number(head);
  api::scan_json_number(head);
  try {
    const std::string body = api::decode_content("zstd", input, kMaxBytes);
    require(body.size() <= kMaxBytes, "a body is larger than its limit");
    require(body.substr(0, head.size()) == head, "head and body differ");
  } catch (const Error&) {
  }
}

}  // namespace ht::fuzz
