#include "server/tinker_api/encode.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "server/tinker_api/test_models.h"
#include "tinker_public.pb.h"

namespace ht::tinker_api {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using worker_protocol::Sample;
using worker_protocol::SampleResult;
using worker_protocol::TrainResult;

template <typename Message>
Message parsed(const std::string& bytes) {
  Message message;
  EXPECT_TRUE(message.ParseFromString(bytes));
  return message;
}

void expect_server_error(const std::function<void()>& action, const std::string& named) {
  try {
    action();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::server);
    EXPECT_THAT(error.what(), HasSubstr(named));
  }
}

TEST(EncodeForwardBackward, OneRecordForEqualTrailingShapes) {
  TrainResult result;
  result.logprobs = {-1, -2, -3, -4, -5};
  result.metrics = {{"loss:sum", 15}};
  const auto out =
      parsed<tinker_public::ForwardBackwardOutput>(encode_forward_backward(result, {{2, 0}, {0, 0}, {3, 0}}));
  EXPECT_EQ(out.loss_fn_output_type(), "ArrayRecord");
  EXPECT_EQ(out.metrics().at("loss:sum"), 15);
  ASSERT_EQ(out.loss_fn_outputs_size(), 1);
  const auto& record = out.loss_fn_outputs(0);
  EXPECT_EQ(record.num_datums(), 3);
  const auto& tensor = record.fields().at("logprobs");
  EXPECT_EQ(tensor.dtype(), tinker_public::DTYPE_FLOAT32);
  EXPECT_THAT(values_of<std::int64_t>(tensor.offsets()), ElementsAre(0, 8, 8, 20));
  EXPECT_THAT(values_of<float>(tensor.data()), ElementsAre(-1, -2, -3, -4, -5));
  EXPECT_EQ(tensor.trailing_shape_size(), 0);
}

TEST(EncodeForwardBackward, AnotherTrailingShapeStartsAnotherRecord) {
  TrainResult result;
  for (int i = 0; i < 10; ++i) result.logprobs.push_back(static_cast<float>(-i));
  const auto out =
      parsed<tinker_public::ForwardBackwardOutput>(encode_forward_backward(result, {{1, 2}, {2, 2}, {1, 1}, {3, 0}}));
  ASSERT_EQ(out.loss_fn_outputs_size(), 3);
  std::vector<std::vector<float>> data;
  std::vector<std::vector<std::int64_t>> trailing;
  for (const auto& record : out.loss_fn_outputs()) {
    const auto& tensor = record.fields().at("logprobs");
    data.push_back(values_of<float>(tensor.data()));
    trailing.emplace_back(tensor.trailing_shape().begin(), tensor.trailing_shape().end());
  }
  EXPECT_THAT(data, ElementsAre(ElementsAre(0, -1, -2, -3, -4, -5), ElementsAre(-6), ElementsAre(-7, -8, -9)));
  EXPECT_THAT(trailing, ElementsAre(ElementsAre(2), ElementsAre(1), ElementsAre()));
}

TEST(EncodeForwardBackward, AWrongNumberOfLogprobsIsTheServersFault) {
  TrainResult result;
  result.logprobs = {-1};
  expect_server_error([&] { encode_forward_backward(result, {{2, 0}}); }, "1 logprobs where 2");
}

Sample sample_request() {
  Sample request;
  request.prompt = {1, 2, 3};
  request.num_samples = 2;
  return request;
}

SampleResult sample_result() {
  SampleResult result;
  result.sequences.resize(2);
  result.sequences[0].tokens = {7, 8};
  result.sequences[0].logprobs = {-0.5f, -1};
  result.sequences[0].stop_reason = worker_protocol::StopReason::stop;
  result.sequences[1].tokens = {9};
  result.sequences[1].logprobs = {-2};
  result.sequences[1].stop_reason = worker_protocol::StopReason::length;
  return result;
}

tinker_public::SampleResponse response(const SampleResult& result, const Sample& request, bool sparse = false) {
  return parsed<tinker_public::SampleResponse>(encode_sample(result, request, sparse));
}

TEST(EncodeSample, Sequences) {
  const auto out = response(sample_result(), sample_request());
  ASSERT_EQ(out.sequences_size(), 2);
  EXPECT_EQ(out.sequences(0).stop_reason(), tinker_public::STOP_REASON_STOP);
  EXPECT_EQ(out.sequences(1).stop_reason(), tinker_public::STOP_REASON_LENGTH);
  EXPECT_THAT(values_of<std::int32_t>(out.sequences(0).tokens()), ElementsAre(7, 8));
  EXPECT_THAT(values_of<float>(out.sequences(0).logprobs()), ElementsAre(-0.5f, -1));
  EXPECT_FALSE(out.has_prompt_logprobs());
  EXPECT_FALSE(out.has_target_prompt_logprobs());
  EXPECT_FALSE(out.has_prompt_alt_tokens());
}

TEST(EncodeSample, PromptLogprobsBeforeTheLastNAreNaN) {
  Sample request = sample_request();
  request.prompt_logprobs = true;
  SampleResult result = sample_result();
  result.prompt_logprobs = {-9, -1, -2};
  auto values = values_of<float>(response(result, request).prompt_logprobs());
  EXPECT_TRUE(std::isnan(values[0]));
  EXPECT_EQ(values[1], -1);
  request.prompt_logprobs_last_n = 1;
  values = values_of<float>(response(result, request).prompt_logprobs());
  EXPECT_TRUE(std::isnan(values[0]) && std::isnan(values[1]));
  EXPECT_EQ(values[2], -2);
}

TEST(EncodeSample, TopK) {
  Sample request = sample_request();
  request.topk_sample_logprobs = request.topk_prompt_logprobs = 2;
  SampleResult result = sample_result();
  result.sequences[0].topk = {2, {7, 1, 8, 2}, {-0.5f, -1, -1, -2}};
  result.topk_prompt = {2, {0, 0, 2, 5, 3, 6}, {-99999.0f, -99999.0f, -1, -2, -1, -3}};
  const auto out = response(result, request);
  EXPECT_EQ(out.sequences(0).topk_sampled_logprobs().k(), 2u);
  EXPECT_EQ(out.sequences(0).topk_sampled_logprobs().length(), 2u);
  EXPECT_FALSE(out.sequences(1).has_topk_sampled_logprobs());
  EXPECT_EQ(out.topk_prompt_logprobs().length(), 3u);
  EXPECT_THAT(values_of<std::int32_t>(out.topk_prompt_logprobs().token_ids()), ElementsAre(0, 0, 2, 5, 3, 6));
}

TEST(EncodeSample, TargetsKeepTheLayoutOfTheRequest) {
  Sample request = sample_request();
  request.target_width = 2;
  request.prompt_targets = {5, -1, -1, 7};
  SampleResult result = sample_result();
  result.target_prompt_logprobs = {-1, 0, 0, -2};
  const auto dense = response(result, request).target_prompt_logprobs();
  EXPECT_THAT(values_of<float>(dense.dense()), ElementsAre(-1, 0, 0, -2));
  EXPECT_THAT(dense.shape(), ElementsAre(2, 2));
  const auto sparse = response(result, request, true).target_prompt_logprobs();
  EXPECT_THAT(values_of<float>(sparse.sparse_csr().values()), ElementsAre(-1, -2));
  EXPECT_THAT(values_of<std::int64_t>(sparse.sparse_csr().crow_indices()), ElementsAre(0, 1, 2));
  EXPECT_THAT(values_of<std::int64_t>(sparse.sparse_csr().col_indices()), ElementsAre(0, 1));
  EXPECT_THAT(sparse.shape(), ElementsAre(2, 2));
}

TEST(EncodeSample, Alternatives) {
  Sample request = sample_request();
  request.prompt_alt_tokens_k = 2;
  SampleResult result = sample_result();
  result.prompt_alt_tokens = {1, 2, 3, 4};
  result.prompt_alt_logprobs = {-1, -2, -3, -4};
  const auto alternatives = response(result, request).prompt_alt_tokens();
  EXPECT_EQ(alternatives.tokens().dtype(), tinker_public::DTYPE_INT32);
  EXPECT_THAT(alternatives.tokens().shape(), ElementsAre(2, 2));
  EXPECT_THAT(values_of<std::int32_t>(alternatives.tokens().dense()), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(values_of<float>(alternatives.logprobs().dense()), ElementsAre(-1, -2, -3, -4));
  result.prompt_alt_tokens.pop_back();
  expect_server_error([&] { encode_sample(result, request, false); }, "3 alternative tokens where 4");
}

TEST(EncodeSample, ResultsThatDoNotFitAreTheServersFault) {
  Sample request = sample_request();
  SampleResult result = sample_result();
  result.sequences.pop_back();
  expect_server_error([&] { encode_sample(result, request, false); }, "1 sequences where 2");
  result = sample_result();
  result.sequences[0].logprobs.pop_back();
  expect_server_error([&] { encode_sample(result, request, false); }, "1 logprobs of sampled tokens where 2");
  request.prompt_logprobs = true;
  expect_server_error([&] { encode_sample(sample_result(), request, false); }, "0 prompt logprobs where 3");
}

TEST(EncodeOptimStep, LeavesOutWhatJsonCannotSay) {
  worker_protocol::OptimResult result;
  result.metrics = {{"grad_norm", 1.5}, {"odd", std::numeric_limits<double>::quiet_NaN()}};
  EXPECT_EQ(encode_optim_step(result), R"({"metrics":{"grad_norm":1.5E0}})");
}

TEST(Rfc3339, UtcWithMicroseconds) {
  using std::chrono::microseconds;
  const auto at = [](std::int64_t micros) {
    return rfc3339(std::chrono::system_clock::time_point(microseconds(micros)));
  };
  EXPECT_EQ(at(0), "1970-01-01T00:00:00.000000Z");
  EXPECT_EQ(at(1769863696789012), "2026-01-31T12:48:16.789012Z");
  EXPECT_EQ(at(-1), "1969-12-31T23:59:59.999999Z");
}

}  // namespace
}  // namespace ht::tinker_api
