#include "server/tinker_api/decode_sample.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/tinker_api/test_models.h"

namespace ht::tinker_api {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr const char* kPrompt = R"("prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]})";

DecodedSample decode(const std::string& fields, const Limits& limits = {}) {
  return decode_sample(parse_object("{" + fields + "}"), small_model(), limits, 77);
}

// With the prompt 1 2 3 and these fields beside it.
DecodedSample with(const std::string& fields, const Limits& limits = {}) {
  return decode(std::string(kPrompt) + (fields.empty() ? "" : ", ") + fields, limits);
}

std::string refused(const std::string& fields, const Limits& limits = {}) {
  return refusal([&] { with(fields, limits); });
}

std::string params(const std::string& fields) {
  return "\"sampling_params\": {" + fields + "}";
}

TEST(DecodeSample, Defaults) {
  const auto work = with("").work;
  EXPECT_THAT(work.prompt, ElementsAre(1, 2, 3));
  EXPECT_EQ(work.num_samples, 1);
  EXPECT_EQ(work.params.max_tokens, 0) << "to the end of the context";
  EXPECT_EQ(work.params.seed, 77u);
  EXPECT_EQ(work.params.temperature, 1.0f);
  EXPECT_EQ(work.params.top_k, -1);
  EXPECT_EQ(work.params.top_p, 1.0f);
  EXPECT_TRUE(work.params.stop_on_eos);
  EXPECT_FALSE(work.prompt_logprobs);
}

TEST(DecodeSample, ChunksAreJoinedAndNumbersMayBeWholeDoubles) {
  const auto work = decode(R"("prompt": {"chunks": [{"tokens": [1.0]}, {"type": "encoded_text", "tokens": []},
                              {"type": "encoded_text", "tokens": [99]}]}, "num_samples": 2.0)")
                        .work;
  EXPECT_THAT(work.prompt, ElementsAre(1, 99));
  EXPECT_EQ(work.num_samples, 2);
}

TEST(DecodeSample, Stops) {
  EXPECT_THAT(with(params(R"("stop": "\n\n")")).work.params.stop_strings, ElementsAre("\n\n"));
  EXPECT_THAT(with(params(R"("stop": ["a", "b"])")).work.params.stop_strings, ElementsAre("a", "b"));
  EXPECT_THAT(with(params(R"("stop": [5, 6])")).work.params.stop_tokens, ElementsAre(5, 6));
  EXPECT_TRUE(with(params(R"("stop": [5, 6])")).work.params.stop_on_eos);
  EXPECT_TRUE(with(params(R"("stop": null)")).work.params.stop_on_eos);
  EXPECT_FALSE(with(params(R"("stop": [])")).work.params.stop_on_eos);
}

TEST(DecodeSample, SeedsOfSixtyFourBits) {
  EXPECT_EQ(with(params(R"("seed": 18446744073709551615)")).work.params.seed, UINT64_MAX);
  EXPECT_EQ(with(params(R"("seed": -1)")).work.params.seed, UINT64_MAX);
  EXPECT_EQ(with(params(R"("seed": 0)")).work.params.seed, 0u);
}

std::string long_prompt(int length) {
  std::string tokens = "1";
  for (int i = 1; i < length; ++i) tokens += ",1";
  return R"("prompt": {"chunks": [{"tokens": [)" + tokens + "]}]}";
}

TEST(DecodeSample, PromptAndAnswerShareTheContext) {
  EXPECT_EQ(decode(long_prompt(10) + "," + params(R"("max_tokens": 6)")).work.params.max_tokens, 6);
  EXPECT_THAT(refusal([] { decode(long_prompt(10) + "," + params(R"("max_tokens": 7)")); }),
              AllOf(HasSubstr("PromptTooLong"), HasSubstr("10 tokens"), HasSubstr("is 7"), HasSubstr("16")));
  // Scoring asks for one token that is never fed: a prompt may fill the context.
  EXPECT_EQ(decode(long_prompt(16) + "," + params(R"("max_tokens": 1)")).work.params.max_tokens, 1);
  EXPECT_EQ(decode(long_prompt(16)).work.params.max_tokens, 0);
  EXPECT_THAT(refusal([] { decode(long_prompt(16) + "," + params(R"("max_tokens": 2)")); }), HasSubstr("16"));
  EXPECT_THAT(refusal([] { decode(long_prompt(17)); }), AllOf(HasSubstr("17"), HasSubstr("16")));
}

TEST(DecodeSample, EveryWrongPromptIsNamed) {
  const auto prompt = [](const std::string& value) { return refusal([&] { decode("\"prompt\": " + value); }); };
  EXPECT_THAT(refusal([] { decode(""); }), HasSubstr("prompt.chunks"));
  EXPECT_THAT(prompt("\"text\""), HasSubstr("\"text\""));
  EXPECT_THAT(prompt(R"({"chunks": 5})"), AllOf(HasSubstr("chunks"), HasSubstr("5")));
  EXPECT_THAT(prompt(R"({"chunks": [5]})"), HasSubstr("5"));
  EXPECT_THAT(prompt(R"({"chunks": []})"), HasSubstr("prompt is empty"));
  EXPECT_THAT(prompt(R"({"chunks": [{"tokens": [1, 100]}]})"), AllOf(HasSubstr("[1] = 100"), HasSubstr("[0, 99]")));
  EXPECT_THAT(prompt(R"({"chunks": [{"tokens": [-1]}]})"), HasSubstr("-1"));
  EXPECT_THAT(prompt(R"({"chunks": [{"tokens": [1.5]}]})"), HasSubstr("1.5"));
  EXPECT_THAT(prompt(R"({"chunks": [{"tokens": ["1"]}]})"), HasSubstr("\"1\""));
  EXPECT_THAT(prompt(R"({"chunks": [{"tokens": "12"}]})"), HasSubstr("\"12\""));
  EXPECT_THAT(prompt(R"({"chunks": [{"type": "image", "data": "", "format": "png"}]})"), HasSubstr("image"));
  EXPECT_THAT(prompt(R"({"chunks": [{"type": "dmel", "dmel": ""}]})"), HasSubstr("audio"));
  EXPECT_THAT(prompt(R"({"chunks": [{"type": "video"}]})"), HasSubstr("\"video\""));
}

TEST(DecodeSample, EveryWrongSettingIsNamed) {
  struct Case {
    std::string fields, name, value;
  };
  for (const Case& wrong : std::vector<Case>{{R"("num_samples": 0)", "num_samples", "0"},
                                             {R"("num_samples": 1025)", "num_samples", "1025"},
                                             {R"("num_samples": "two")", "num_samples", "two"},
                                             {R"("topk_prompt_logprobs": -1)", "topk_prompt_logprobs", "-1"},
                                             {R"("topk_sample_logprobs": 101)", "topk_sample_logprobs", "101"},
                                             {R"("prompt_alt_tokens_k": 1025)", "prompt_alt_tokens_k", "1025"},
                                             {R"("prompt_logprobs": 1)", "prompt_logprobs", "1"},
                                             {params(R"("max_tokens": 0)"), "max_tokens", "0"},
                                             {params(R"("max_tokens": 1.5)"), "max_tokens", "1.5"},
                                             {params(R"("temperature": -0.5)"), "temperature", "-0.5"},
                                             {params(R"("temperature": "hot")"), "temperature", "hot"},
                                             {params(R"("temperature": null)"), "temperature", "null"},
                                             {params(R"("top_p": 0)"), "top_p", "0"},
                                             {params(R"("top_p": 1.5)"), "top_p", "1.5"},
                                             {params(R"("top_k": 0)"), "top_k", "0"},
                                             {params(R"("top_k": -2)"), "top_k", "-2"},
                                             {params(R"("seed": 1.5)"), "seed", "1.5"},
                                             {params(R"("stop": 5)"), "stop", "5"},
                                             {params(R"("stop": "")"), "stop", "empty"},
                                             {params(R"("stop": [100])"), "stop", "100"},
                                             {params(R"("stop": ["a", 5])"), "stop", "5"},
                                             {params(R"("stop": [5, "a"])"), "stop", "\"a\""},
                                             {R"("sampling_params": [])", "sampling_params", "array"}}) {
    EXPECT_THAT(refused(wrong.fields), AllOf(HasSubstr(wrong.name), HasSubstr(wrong.value))) << wrong.fields;
  }
  Limits limits;
  limits.max_stops = 2;
  limits.max_stop_bytes = 3;
  EXPECT_THAT(refused(params(R"("stop": [1, 2, 3])"), limits), AllOf(HasSubstr("3"), HasSubstr("2")));
  EXPECT_THAT(refused(params(R"("stop": "four")"), limits), AllOf(HasSubstr("4 bytes"), HasSubstr("3")));
}

std::string targets(const std::string& fields) {
  return R"("target_prompt_logprobs": {"dtype": "int64", )" + fields + "}";
}

TEST(DecodeSample, WhatIsReturnedIsBounded) {
  ServedModel model = small_model();
  model.max_seq_len = 100000;
  const auto decode_for = [&](const std::string& fields) {
    return decode_sample(parse_object("{" + std::string(kPrompt) + "," + fields + "}"), model, {}, 1);
  };
  const std::string many = R"("num_samples": 1024, "topk_sample_logprobs": 10, )";
  EXPECT_EQ(decode_for(many + params(R"("max_tokens": 5000)")).work.topk_sample_logprobs, 10);
  EXPECT_THAT(
      refusal([&] { decode_for(many + params(R"("max_tokens": 60000)")); }),
      AllOf(HasSubstr("675840000"), HasSubstr("67108864"), HasSubstr("1024"), HasSubstr("60000"), HasSubstr("10")));
  EXPECT_THAT(refusal([&] { decode_for(R"("num_samples": 1024, )" + params(R"("max_tokens": 70000)")); }),
              AllOf(HasSubstr("71680000"), HasSubstr("70000")));
  EXPECT_THAT(refusal([&] { decode_for(R"("num_samples": 1000)"); }), HasSubstr("max_tokens = 99997"));
  Limits narrow;
  narrow.max_result_cells = 100;
  const std::string wide = targets(R"("shape": [2, 40], "data": [0)" +
                                   [] {
                                     std::string rest;
                                     for (int i = 1; i < 80; ++i) rest += ", 0";
                                     return rest;
                                   }() +
                                   "]") +
                           ", " + params(R"("max_tokens": 1)");
  EXPECT_THAT(refused(wide, narrow), AllOf(HasSubstr("121"), HasSubstr("100"), HasSubstr("width = 40")));
}

TEST(DecodeSample, LastN) {
  const std::string asked = R"("prompt_logprobs": true, "prompt_logprobs_last_n": )";
  EXPECT_EQ(with(asked + "2").work.prompt_logprobs_last_n, 2);
  for (const char* wrong : {"0", "3", "-1"}) {
    EXPECT_THAT(refused(asked + wrong), AllOf(HasSubstr(std::string("= ") + wrong), HasSubstr("[1, 2]")));
  }
  EXPECT_THAT(refused(R"("prompt_logprobs_last_n": 1)"), HasSubstr("prompt_logprobs"));
}

TEST(DecodeSample, TargetsDenseAndSparse) {
  const DecodedSample dense = with(targets(R"("data": [5, -1, -1, 7], "shape": [2, 2])"));
  EXPECT_THAT(dense.work.prompt_targets, ElementsAre(5, -1, -1, 7));
  EXPECT_EQ(dense.work.target_width, 2);
  EXPECT_FALSE(dense.sparse_targets);
  const DecodedSample sparse = with(
      targets(R"("data": [5, 7], "shape": [2, 2], "sparse_crow_indices": [0, 1, 2], "sparse_col_indices": [0, 1])"));
  EXPECT_THAT(sparse.work.prompt_targets, ElementsAre(5, -1, -1, 7));
  EXPECT_TRUE(sparse.sparse_targets);
  const DecodedSample none =
      with(targets(R"("data": [], "shape": [2, 2], "sparse_crow_indices": [0, 0, 0], "sparse_col_indices": [])"));
  EXPECT_THAT(none.work.prompt_targets, ElementsAre(-1, -1, -1, -1));
}

TEST(DecodeSample, EveryWrongTargetIsNamed) {
  struct Case {
    std::string fields, named;
  };
  for (const Case& wrong : std::vector<Case>{
           {R"("data": [5, 6], "shape": [2])", "(2)"},
           {R"("data": [5, 6, 7], "shape": [3, 1])", "(3, 1)"},
           {R"("data": [], "shape": [2, 0])", "(2, 0)"},
           {R"("data": [5, 6], "shape": [2, 5000])", "4096"},
           {R"("data": [5, 6, 7], "shape": [2, 2])", "3 values"},
           {R"("data": [5, 100], "shape": [2, 1])", "100"},
           {R"("data": [5, -2], "shape": [2, 1])", "-2"},
           {R"("data": [5], "shape": [2, 2], "sparse_crow_indices": [0, 1, 1])", "sparse_col_indices"},
           {R"("data": [5], "shape": [2, 2], "sparse_crow_indices": [0, 1], "sparse_col_indices": [0])",
            "row pointers"},
           {R"("data": [5], "shape": [2, 2], "sparse_crow_indices": [0, 1, 1], "sparse_col_indices": [2])", "[0, 2)"},
           {R"("data": [-1], "shape": [2, 2], "sparse_crow_indices": [0, 1, 1], "sparse_col_indices": [0])", "-1"}}) {
    EXPECT_THAT(refused(targets(wrong.fields)), AllOf(HasSubstr("target_prompt_logprobs"), HasSubstr(wrong.named)))
        << wrong.fields;
  }
  EXPECT_THAT(refused(R"("target_prompt_logprobs": {"dtype": "float32", "data": [1, 2], "shape": [2, 1]})"),
              HasSubstr("float32"));
}

TEST(ParseObject, BrokenJsonIsRefusedWithItsPlace) {
  const std::string text = R"({"a": [1, {"b": "c"}], "d": null})";
  EXPECT_EQ(parse_object(text).size(), 2u);
  for (std::size_t cut = 0; cut < text.size(); ++cut) {
    EXPECT_THAT(refusal([&] { parse_object(std::string_view(text).substr(0, cut)); }),
                HasSubstr("of " + std::to_string(cut)));
  }
  EXPECT_THAT(refusal([] { parse_object("[1]"); }), HasSubstr("object"));
  EXPECT_THAT(refusal([] { parse_object("{} {}"); }), HasSubstr("no JSON"));
  EXPECT_THAT(refusal([] { parse_object("{\"a\": NaN}"); }), HasSubstr("no JSON"));
  EXPECT_THAT(refusal([] { parse_object(std::string(100000, '[')); }), HasSubstr("no JSON"));
  EXPECT_THAT(refusal([] { parse_object("{\"a\": \"\xff\"}"); }), HasSubstr("no JSON"));
}

}  // namespace
}  // namespace ht::tinker_api
