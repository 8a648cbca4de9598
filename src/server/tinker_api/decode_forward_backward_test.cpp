#include "server/tinker_api/decode_forward_backward.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "server/tinker_api/test_models.h"

namespace ht::tinker_api {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Message = tinker_public::ForwardBackwardRequest;
using tinker_public::Tensor;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

Tensor dense(const std::vector<std::int64_t>& values, std::vector<std::int64_t> shape = {}) {
  Tensor tensor;
  tensor.set_dense(bytes_of(values));
  tensor.set_dtype(tinker_public::DTYPE_INT64);
  if (shape.empty()) shape = {static_cast<std::int64_t>(values.size())};
  for (const std::int64_t extent : shape) tensor.add_shape(extent);
  return tensor;
}

Tensor dense(const std::vector<float>& values, std::vector<std::int64_t> shape = {}) {
  Tensor tensor = dense(std::vector<std::int64_t>(values.size()), std::move(shape));
  tensor.set_dense(bytes_of(values));
  tensor.set_dtype(tinker_public::DTYPE_FLOAT32);
  return tensor;
}

template <typename T>
Tensor csr(const std::vector<T>& values, const std::vector<std::int64_t>& crow, const std::vector<std::int64_t>& col,
           std::int64_t rows, std::int64_t cols) {
  Tensor tensor = dense(values, {rows, cols});
  tensor.mutable_sparse_csr()->set_values(bytes_of(values));
  tensor.mutable_sparse_csr()->set_crow_indices(bytes_of(crow));
  tensor.mutable_sparse_csr()->set_col_indices(bytes_of(col));
  return tensor;
}

// Adds a datum of one text chunk.
tinker_public::Datum& add(Message& message, const std::vector<std::int32_t>& tokens) {
  tinker_public::Datum& datum = *message.add_data();
  datum.add_model_input()->mutable_encoded_text()->set_tokens(bytes_of(tokens));
  return datum;
}

void put(tinker_public::Datum& datum, const std::string& key, const Tensor& tensor) {
  (*datum.mutable_loss_fn_inputs())[key] = tensor;
}

// Two datums of 3 and 2 tokens with targets.
Message two_datums(const std::string& loss = "cross_entropy") {
  Message message;
  message.set_model_id("s:train:0");
  message.set_seq_id(1);
  message.set_loss_fn(loss);
  put(add(message, {1, 2, 3}), "target_tokens", dense(std::vector<std::int64_t>{2, 3, 4}));
  put(add(message, {5, 6}), "target_tokens", dense(std::vector<std::int64_t>{6, 7}));
  return message;
}

Message rl_datum(const std::string& loss) {
  Message message;
  message.set_model_id("s:train:0");
  message.set_loss_fn(loss);
  tinker_public::Datum& datum = add(message, {1, 2, 3});
  put(datum, "target_tokens", dense(std::vector<std::int64_t>{2, 3, 4}));
  put(datum, "logprobs", dense(std::vector<float>{-1, -2, -3}));
  put(datum, "advantages", dense(std::vector<float>{0, 1, 2}));
  return message;
}

DecodedForwardBackward decode(const Message& message, const Limits& limits = {}) {
  // Over the wire, as a client's request comes.
  return decode_forward_backward(*parse_forward_backward(message.SerializeAsString()), small_model(), limits);
}

std::string refused(const Message& message, const Limits& limits = {}) {
  return refusal([&] { decode(message, limits); });
}

TEST(DecodeForwardBackward, LaysDatumsOutFlat) {
  Message message = two_datums();
  message.set_forward_only(true);
  put(*message.mutable_data(1), "weights", dense(std::vector<float>{0.5f, -2}));
  const DecodedForwardBackward decoded = decode(message);
  const auto& batch = decoded.work.batch;
  EXPECT_EQ(decoded.work.adapter, "s:train:0");
  EXPECT_TRUE(decoded.work.forward_only);
  EXPECT_THAT(batch.tokens, ElementsAre(1, 2, 3, 5, 6));
  EXPECT_THAT(batch.cu_seqlens, ElementsAre(0, 3, 5));
  EXPECT_THAT(batch.targets, ElementsAre(2, 3, 4, 6, 7));
  EXPECT_THAT(batch.target_width, ElementsAre(1, 1));
  // The first datum gave none: 1 each.
  EXPECT_THAT(batch.weights, ElementsAre(1, 1, 1, 0.5f, -2));
  EXPECT_THAT(decoded.shapes, ElementsAre(TargetShape{3, 0}, TargetShape{2, 0}));
}

TEST(DecodeForwardBackward, ChunksOfTextAreJoined) {
  Message message = two_datums();
  message.mutable_data(0)->clear_model_input();
  for (const std::vector<std::int32_t>& part : {std::vector<std::int32_t>{1}, {}, {2, 3}}) {
    message.mutable_data(0)->add_model_input()->mutable_encoded_text()->set_tokens(bytes_of(part));
  }
  EXPECT_THAT(decode(message).work.batch.tokens, ElementsAre(1, 2, 3, 5, 6));
}

TEST(DecodeForwardBackward, MatricesDenseAndSparseAreEqual) {
  const std::vector<std::int64_t> targets{2, 0, 9, 3, 0, 0};
  const std::vector<float> weights{0.5f, 0, -1, 2, 0, 0};
  Message message = two_datums();
  put(*message.mutable_data(0), "target_tokens", dense(targets, {3, 2}));
  put(*message.mutable_data(0), "weights", dense(weights, {3, 2}));
  const DecodedForwardBackward full = decode(message);
  EXPECT_THAT(full.work.batch.target_width, ElementsAre(2, 1));
  EXPECT_THAT(full.shapes, ElementsAre(TargetShape{3, 2}, TargetShape{2, 0}));
  // Their patterns differ: unlisted cells are 0.
  put(*message.mutable_data(0), "target_tokens",
      csr(std::vector<std::int64_t>{2, 9, 3}, {0, 1, 3, 3}, {0, 0, 1}, 3, 2));
  put(*message.mutable_data(0), "weights", csr(std::vector<float>{0.5f, 0, -1, 2}, {0, 2, 4, 4}, {0, 1, 0, 1}, 3, 2));
  EXPECT_EQ(decode(message).work.batch, full.work.batch);
}

TEST(DecodeForwardBackward, AnAllZeroSparseTensorHasNoValues) {
  Message message = two_datums();
  put(*message.mutable_data(1), "target_tokens", csr(std::vector<std::int64_t>{}, {0, 0, 0}, {}, 2, 3));
  put(*message.mutable_data(1), "weights", csr(std::vector<float>{}, {0, 0, 0}, {}, 2, 3));
  const auto batch = decode(message).work.batch;
  EXPECT_THAT(batch.targets, ElementsAre(2, 3, 4, 0, 0, 0, 0, 0, 0));
  EXPECT_THAT(batch.weights, ElementsAre(1, 1, 1, 0, 0, 0, 0, 0, 0));
}

TEST(DecodeForwardBackward, HostileSparseIndices) {
  constexpr auto kMin = std::numeric_limits<std::int64_t>::min();
  constexpr auto kMax = std::numeric_limits<std::int64_t>::max();
  struct Case {
    std::vector<std::int64_t> crow, col;
    std::size_t values;
    const char* named;
  };
  for (const Case& hostile : std::vector<Case>{{{0, 1}, {0}, 1, "row pointers"},
                                               {{0, 1, 1, 1}, {0}, 1, "row pointers"},
                                               {{}, {}, 0, "row pointers"},
                                               {{1, 1, 1}, {0}, 1, "go from 0"},
                                               {{0, 1, 2}, {0}, 1, "go from 0"},
                                               {{0, 2, 1}, {0}, 1, "2"},
                                               {{0, kMax, 1}, {0}, 1, "9223372036854775807"},
                                               {{0, -5, 1}, {0}, 1, "-5"},
                                               {{0, 1, 1}, {3}, 1, "[0, 3)"},
                                               {{0, 1, 1}, {-1}, 1, "-1"},
                                               {{0, 1, 1}, {kMin}, 1, "-9223372036854775808"},
                                               {{0, 2, 2}, {1, 1}, 2, "ascend"},
                                               {{0, 2, 2}, {2, 0}, 2, "ascend"},
                                               {{0, 1, 1}, {0}, 2, "16 bytes"},
                                               {{0, 2, 2}, {0, 1}, 1, "8 bytes"}}) {
    Message message = two_datums();
    put(*message.mutable_data(1), "target_tokens",
        csr(std::vector<std::int64_t>(hostile.values, 1), hostile.crow, hostile.col, 2, 3));
    EXPECT_THAT(refused(message), testing::AllOf(HasSubstr("datum 1: target_tokens"), HasSubstr(hostile.named)));
  }
  Message odd = two_datums();
  Tensor tensor = csr(std::vector<std::int64_t>{1}, {0, 1, 1}, {0}, 2, 3);
  tensor.mutable_sparse_csr()->mutable_crow_indices()->pop_back();
  put(*odd.mutable_data(1), "target_tokens", tensor);
  EXPECT_THAT(refused(odd), HasSubstr("23"));
  Tensor flat = csr(std::vector<std::int64_t>{1}, {0, 1, 1}, {0}, 2, 3);
  flat.clear_shape();
  flat.add_shape(2);
  put(*odd.mutable_data(1), "target_tokens", flat);
  EXPECT_THAT(refused(odd), HasSubstr("two dimensions"));
}

TEST(DecodeForwardBackward, EveryWrongTensorIsNamed) {
  struct Case {
    const char* key;
    Tensor tensor;
    std::vector<const char*> named;
  };
  Tensor unknown_dtype = dense(std::vector<std::int64_t>{1, 2, 3});
  unknown_dtype.set_dtype(static_cast<tinker_public::DType>(9));
  Tensor cut = dense(std::vector<std::int64_t>{1, 2, 3});
  cut.mutable_dense()->pop_back();
  Tensor shapeless = cut;
  shapeless.clear_shape();
  std::vector<Case> cases = {
      {"target_tokens", dense(std::vector<std::int64_t>{2, 3}), {"(2)", "3 tokens"}},
      {"target_tokens", dense(std::vector<std::int64_t>{2, 100, 4}), {"[1] = 100", "[0, 100)"}},
      {"target_tokens", dense(std::vector<std::int64_t>{2, 3, -1}), {"[2] = -1", "[0, 100)"}},
      {"target_tokens", dense(std::vector<float>{2, 3.5f, 4}), {"[1] = 3.5", "whole number"}},
      {"target_tokens", dense(std::vector<float>{2, kNan, 4}), {"[1]", "nan"}},
      {"target_tokens", dense(std::vector<std::int64_t>{2, 3, 4}, {3, 1, 1}), {"3 dimensions"}},
      {"target_tokens", dense(std::vector<std::int64_t>{}, {3, 0}), {"0 targets"}},
      {"target_tokens", dense(std::vector<std::int64_t>{2, 3, 4}, {-3}), {"-3"}},
      {"target_tokens", dense(std::vector<std::int64_t>{2, 3, 4}, {std::int64_t{1} << 62}), {"4611686018427387904"}},
      {"target_tokens", unknown_dtype, {"dtype 9", "float32"}},
      {"target_tokens", cut, {"24 bytes", "23"}},
      {"target_tokens", shapeless, {"23", "8 bytes"}},
      {"weights", dense(std::vector<float>{1, kNan, 1}), {"NonFiniteInTensor", "[1]", "NaN"}},
      {"weights", dense(std::vector<float>{1, 1, -kInf}), {"NonFiniteInTensor", "[2]", "-inf"}},
      {"weights", dense(std::vector<float>{1, 1}), {"(2)", "(3)"}},
      {"weights", dense(std::vector<float>(6), {3, 2}), {"(3, 2)", "(3)"}},
      {"advantages", dense(std::vector<float>{1, 1, 1}), {"advantages", "cross_entropy", "weights"}},
  };
  for (const Case& wrong : cases) {
    Message message = two_datums();
    put(*message.mutable_data(0), wrong.key, wrong.tensor);
    const std::string text = refused(message);
    EXPECT_THAT(text, HasSubstr(std::string("datum 0")));
    for (const char* named : wrong.named) EXPECT_THAT(text, HasSubstr(named));
  }
}

TEST(DecodeForwardBackward, EveryWrongRequestIsNamed) {
  Message message;
  message.set_loss_fn("cross_entropy");
  EXPECT_THAT(refused(message), HasSubstr("data is empty"));
  Limits few;
  few.max_datums = 1;
  EXPECT_THAT(refused(two_datums(), few), HasSubstr("2 datums; at most 1"));
  EXPECT_THAT(refused(two_datums("cross_entropi")),
              testing::AllOf(HasSubstr("\"cross_entropi\""), HasSubstr("importance_sampling")));
  message = two_datums();
  message.mutable_data(1)->clear_loss_fn_inputs();
  EXPECT_THAT(refused(message), HasSubstr("datum 1: input \"target_tokens\" is missing"));
  message = two_datums();
  message.mutable_data(1)->clear_model_input();
  EXPECT_THAT(refused(message), HasSubstr("datum 1 is empty"));
  message = two_datums();
  add(message, std::vector<std::int32_t>(17, 1));
  EXPECT_THAT(refused(message), HasSubstr("datum 2 has 17 tokens; the context of test/small is at most 16"));
  for (const std::int32_t token : {-1, 100, std::numeric_limits<std::int32_t>::min()}) {
    message = two_datums();
    add(message, {1, token});
    EXPECT_THAT(refused(message), HasSubstr("[1] = " + std::to_string(token)));
  }
  message = two_datums();
  message.mutable_data(0)->mutable_model_input(0)->mutable_encoded_text()->set_tokens("12345");
  EXPECT_THAT(refused(message), HasSubstr("5 bytes"));
  message.mutable_data(0)->mutable_model_input(0)->mutable_image()->set_data("png");
  EXPECT_THAT(refused(message), HasSubstr("image chunks are not supported"));
  message.mutable_data(0)->mutable_model_input(0)->mutable_dmel()->set_dmel("x");
  EXPECT_THAT(refused(message), HasSubstr("audio"));
  message.mutable_data(0)->mutable_model_input(0)->Clear();
  EXPECT_THAT(refused(message), HasSubstr("unknown kind"));
}

TEST(DecodeForwardBackward, CellsOfTheWholeRequestAreBounded) {
  Limits limits;
  limits.max_target_cells = 20;
  Message message = two_datums();
  put(*message.mutable_data(0), "target_tokens", csr(std::vector<std::int64_t>{}, {0, 0, 0, 0}, {}, 3, 6));
  EXPECT_EQ(decode(message, limits).work.batch.targets.size(), 20u);
  put(*message.mutable_data(0), "target_tokens", csr(std::vector<std::int64_t>{}, {0, 0, 0, 0}, {}, 3, 7));
  EXPECT_THAT(refused(message, limits), HasSubstr("20"));
  limits.max_target_width = 5;
  put(*message.mutable_data(0), "target_tokens", csr(std::vector<std::int64_t>{}, {0, 0, 0, 0}, {}, 3, 6));
  EXPECT_THAT(refused(message, limits), HasSubstr("1 to 5"));
}

TEST(DecodeForwardBackward, LossInputsAndConfiguration) {
  Message message = rl_datum("ppo");
  EXPECT_THAT(decode(message).work.batch.advantages, ElementsAre(0, 1, 2));
  EXPECT_EQ(decode(message).work.config.clip_high_threshold, 1.2);
  (*message.mutable_loss_fn_config())["clip_high_threshold"] = 2;
  EXPECT_EQ(decode(message).work.config.clip_high_threshold, 2);
  // v2 wins as a whole; text that holds a number is one.
  (*message.mutable_loss_fn_config_v2())["clip_low_threshold"].set_text("0.5");
  EXPECT_EQ(decode(message).work.config.clip_high_threshold, 1.2);
  EXPECT_EQ(decode(message).work.config.clip_low_threshold, 0.5);
  (*message.mutable_loss_fn_config_v2())["clip_low_threshold"].set_text("much");
  EXPECT_THAT(refused(message), HasSubstr("\"much\""));
  (*message.mutable_loss_fn_config_v2())["clip_low_threshold"].set_number(5);
  EXPECT_THAT(refused(message), testing::AllOf(HasSubstr("clip_low_threshold"), HasSubstr("above")));
  for (const double value : {double{kNan}, double{kInf}, -1.0}) {
    (*message.mutable_loss_fn_config_v2())["clip_low_threshold"].set_number(value);
    EXPECT_THAT(refused(message), HasSubstr("clip_low_threshold"));
  }
  message.clear_loss_fn_config_v2();
  (*message.mutable_loss_fn_config())["clip_hi"] = 1;
  EXPECT_THAT(refused(message), testing::AllOf(HasSubstr("clip_hi"), HasSubstr("clip_high_threshold")));

  for (const char* key : {"logprobs", "advantages"}) {
    message = rl_datum("importance_sampling");
    message.mutable_data(0)->mutable_loss_fn_inputs()->erase(key);
    EXPECT_THAT(refused(message), HasSubstr(std::string("\"") + key + "\" is missing"));
  }
  message = rl_datum("cispo");
  put(*message.mutable_data(0), "target_tokens", dense(std::vector<std::int64_t>(6, 1), {3, 2}));
  EXPECT_THAT(refused(message), testing::AllOf(HasSubstr("(3, 2)"), HasSubstr("cispo")));
}

TEST(DecodeForwardBackward, SpansOfStableReinforce) {
  Message message = rl_datum("stable_reinforce");
  tinker_public::Datum& datum = *message.mutable_data(0);
  EXPECT_THAT(refused(message), HasSubstr("model_input_spans is missing"));
  const auto prompt = [](auto* span, std::int64_t offset, std::int64_t length) {
    span->mutable_prompt_tokens()->set_offset(offset);
    span->mutable_prompt_tokens()->set_length(length);
  };
  const auto sampled = [](auto* span, std::int64_t offset, std::int64_t length) {
    span->mutable_sampled_tokens()->set_offset(offset);
    span->mutable_sampled_tokens()->set_length(length);
  };
  prompt(datum.add_model_input_spans(), 0, 2);
  EXPECT_THAT(refused(message), HasSubstr("covers 2 positions of 3"));
  sampled(datum.add_model_input_spans(), 0, 1);
  prompt(datum.add_loss_fn_input_spans(), 1, 1);
  sampled(datum.add_loss_fn_input_spans(), 0, 2);
  EXPECT_EQ(decode(message).work.loss, worker_protocol::LossKind::stable_reinforce);
  put(datum, "advantages", dense(std::vector<float>{0.5f, 1, 2}));
  EXPECT_THAT(refused(message), testing::AllOf(HasSubstr("advantages[0] = 0.5"), HasSubstr("prompt position")));
  for (const std::int64_t length : {std::int64_t{-1}, std::int64_t{3}, std::numeric_limits<std::int64_t>::max()}) {
    datum.mutable_loss_fn_input_spans(1)->mutable_sampled_tokens()->set_length(length);
    EXPECT_THAT(refused(message), HasSubstr(std::to_string(length)));
  }
  datum.mutable_loss_fn_input_spans(1)->Clear();
  EXPECT_THAT(refused(message), HasSubstr("neither"));
}

TEST(ParseForwardBackward, CutAtEveryByteItIsRefusedOrWhole) {
  Message message = rl_datum("ppo");
  put(*message.mutable_data(0), "weights", csr(std::vector<float>{1}, {0, 1, 1, 1}, {0}, 3, 2));
  const std::string bytes = message.SerializeAsString();
  int accepted = 0;
  for (std::size_t cut = 0; cut < bytes.size(); ++cut) {
    try {
      const auto parsed = parse_forward_backward(std::string_view(bytes).substr(0, cut));
      // A cut between two fields leaves a message; what it lacks is found then.
      ++accepted;
      EXPECT_NE(parsed->SerializeAsString(), bytes);
      EXPECT_FALSE(refusal([&] { decode_forward_backward(*parsed, small_model(), {}); }).empty());
    } catch (const Error& error) {
      EXPECT_EQ(error.category(), ErrorCategory::user);
      EXPECT_THAT(error.what(), HasSubstr(std::to_string(cut)));
    }
  }
  EXPECT_LT(accepted, 8);
}

TEST(ParseForwardBackward, NoiseIsRefusedOrDecodedButNeverCrashes) {
  Message message = two_datums();
  put(*message.mutable_data(0), "target_tokens",
      csr(std::vector<std::int64_t>{2, 9, 3}, {0, 1, 3, 3}, {0, 0, 1}, 3, 2));
  const std::string bytes = message.SerializeAsString();
  std::mt19937 random(3);
  int refusals = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string noisy = bytes;
    for (int flips = 0; flips < 2; ++flips) noisy[random() % noisy.size()] = static_cast<char>(random());
    try {
      decode_forward_backward(*parse_forward_backward(noisy), small_model(), {});
    } catch (const Error& error) {
      ++refusals;
      EXPECT_EQ(error.category(), ErrorCategory::user);
    }
  }
  EXPECT_GT(refusals, 1000);
}

TEST(ParseForwardBackward, UnknownFieldsAreSkipped) {
  // Field 200, of length 3.
  const std::string bytes = two_datums().SerializeAsString() + std::string(
                                                                   "\xc2\x0c\x03"
                                                                   "abc",
                                                                   6);
  EXPECT_THAT(parse_forward_backward(bytes)->data_size(), 2);
}

}  // namespace
}  // namespace ht::tinker_api
