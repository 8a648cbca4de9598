#include "worker_protocol/codec.h"

#include <gmock/gmock.h>

#include <cmath>
#include <limits>
#include <random>

#include "base/error.h"

namespace ht::worker_protocol {

// Messages are printed by the kind of their body only.
void PrintTo(const RequestBody& body, std::ostream* out) {
  *out << "request body " << body.index();
}
void PrintTo(const DoneBody& body, std::ostream* out) {
  *out << "done body " << body.index();
}

namespace {

// One of every kind, each field different from its default.
std::vector<RequestBody> all_requests() {
  Replay replay;
  replay.micro_batches = {{.number = 9, .slices = {{7, 0, 3}, {8, 2, 5}}}, {.number = 10, .slices = {}}};
  TrainBatch batch{.tokens = {1, 2, 151935},
                   .cu_seqlens = {0, 2, 3},
                   .target_width = {1, 2},
                   .targets = {5, -6, 7, std::numeric_limits<std::int32_t>::max()},
                   .weights = {1, -0.0f, 0.5f, std::numeric_limits<float>::infinity()},
                   .logprobs = {-1, -2, -3, -4},
                   .advantages = {1, 2, 3, 4},
                   .sequence_ratio_mask = {0, 1, 1, 0},
                   .clip_low_threshold = {.1f, .2f, .3f, .4f},
                   .clip_high_threshold = {1.1f, 1.2f, 1.3f, 1.4f}};
  Sample sample{.version = "v",
                .version_dir = "/d/\xff",
                .prompt = {4, 5},
                .num_samples = 3,
                .params = {.max_tokens = 17,
                           .seed = 0xffffffffffffffff,
                           .temperature = 0.25f,
                           .top_k = 50,
                           .top_p = 0.5f,
                           .stop_on_eos = false,
                           .stop_tokens = {2, 3},
                           .stop_strings = {"", "a\xf0", std::string("\0x", 2)}},
                .prompt_logprobs = true,
                .prompt_logprobs_last_n = 11,
                .topk_prompt_logprobs = 12,
                .topk_sample_logprobs = 13,
                .target_width = 2,
                .prompt_targets = {-1, 9},
                .prompt_alt_tokens_k = 4,
                .owner = "o"};
  return {
      CreateAdapter{.adapter = "a",
                    .lora = {.rank = 8, .seed = 3, .train_attn = false, .train_mlp = false, .train_unembed = false},
                    .load_dir = "/l",
                    .load_optimizer = true},
      DropAdapter{"a"},
      ForwardBackward{
          .adapter = "a", .batch = batch, .loss = LossKind::gspo, .config = {.1, .2, .3, .4}, .forward_only = true},
      OptimStep{"a", {1e-3, 0.8, 0.99, 1e-8, 0.1, 1.0}},
      SaveAdapter{"a", "/s", false},
      LoadAdapter{"a", "/s", true},
      PublishVersion{"a", "v", "/v"},
      replay,
      sample,
      DropVersion{"v"},
      Initialize{"/m", "{}", 4096, 2},
      SetTokenTable{"/t"},
      Cancel{12},
      Snapshot{"/snap"},
      Restore{"/snap"},
      Status{},
      Shutdown{},
  };
}

std::vector<DoneBody> all_done() {
  SampledSequence sequence{StopReason::stop, {1, 2}, {-0.5f, -0.25f}, {2, {1, 2, 3, 0}, {-1, -2, -3, -99999}}};
  SampleResult sample{.sequences = {sequence, {StopReason::length, {}, {}, {}}},
                      .prompt_logprobs = {-1, -2},
                      .topk_prompt = {1, {3}, {-4}},
                      .target_prompt_logprobs = {-7},
                      .prompt_alt_tokens = {8},
                      .prompt_alt_logprobs = {-9},
                      .prompt_cache_hit_tokens = 16};
  return {
      Ack{},
      WorkerInfo{2048, "cpu", "base 1 GB\ncache 2 GB"},
      TrainResult{{-1, -2}, {{"loss:sum", 3.5}, {"tokens:sum", 2}}, 0.125},
      OptimResult{{{"grad_norm:mean", 1.5}}, 0.25},
      SaveResult{1'000'000'000'000},
      sample,
      SnapshotResult{{{"a", 4}, {"b", 0xffffffffffffffff}}, {"v1", "v2"}},
      StatusResult{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
  };
}

std::vector<Reply> all_replies() {
  std::vector<Reply> replies;
  for (DoneBody& body : all_done()) replies.push_back({replies.size() + 1, Done{std::move(body)}});
  replies.push_back({20, Failure{ErrorCategory::user, "token 7 \xff"}});
  replies.push_back({21, Failure{ErrorCategory::unknown, ""}});
  replies.push_back({22, Progress{0.5, "loading"}});
  replies.push_back({0, MicroBatchExecuted{{3, {{1, 0, 1}}}}});
  return replies;
}

TEST(Codec, EveryRequestComesBack) {
  const auto bodies = all_requests();
  ASSERT_EQ(bodies.size(), std::variant_size_v<RequestBody>);
  for (std::size_t i = 0; i < bodies.size(); ++i) {
    ASSERT_EQ(bodies[i].index(), i);
    const Request back = decode_request(encode(Request{i + 1, bodies[i]}));
    EXPECT_EQ(back.id, i + 1);
    EXPECT_EQ(back.body, bodies[i]);
  }
}

TEST(Codec, DefaultsComeBackToo) {
  for (const RequestBody& body : {RequestBody(CreateAdapter{}), RequestBody(ForwardBackward{}),
                                  RequestBody(OptimStep{}), RequestBody(Sample{}), RequestBody(Replay{})}) {
    EXPECT_EQ(decode_request(encode(Request{0, body})).body, body);
  }
}

TEST(Codec, EveryReplyComesBack) {
  ASSERT_EQ(all_done().size(), std::variant_size_v<DoneBody>);
  for (const Reply& reply : all_replies()) {
    const Reply back = decode_reply(encode(reply));
    EXPECT_EQ(back.id, reply.id);
    EXPECT_TRUE(back.body == reply.body) << reply.id;
  }
}

TEST(Codec, NotANumberSurvives) {
  SampleResult result;
  result.prompt_logprobs = {std::numeric_limits<float>::quiet_NaN(), -1};
  const Reply back = decode_reply(encode(Reply{1, Done{result}}));
  const auto& logprobs = std::get<SampleResult>(std::get<Done>(back.body).body).prompt_logprobs;
  ASSERT_EQ(logprobs.size(), 2u);
  EXPECT_TRUE(std::isnan(logprobs[0]));
}

TEST(Codec, TruncatedAndRandomBytesAreRefusedOrDecoded) {
  std::mt19937 random(5);
  std::vector<std::string> good;
  std::size_t index = 0;
  for (const RequestBody& body : all_requests()) good.push_back(encode(Request{++index, body}));
  for (const Reply& reply : all_replies()) good.push_back(encode(reply));
  int refused = 0;
  const auto probe = [&refused](const std::string& bytes) {
    try {
      encode(decode_request(bytes));
    } catch (const Error& error) {
      EXPECT_EQ(error.category(), ErrorCategory::server);
      ++refused;
    }
    try {
      encode(decode_reply(bytes));
    } catch (const Error& error) {
      EXPECT_EQ(error.category(), ErrorCategory::server);
      ++refused;
    }
  };
  for (const std::string& bytes : good) {
    for (std::size_t size = 0; size < bytes.size(); ++size) probe(bytes.substr(0, size));
    for (int round = 0; round < 50; ++round) {
      std::string bad = bytes;
      for (int flips = 0; flips < 2; ++flips) bad[random() % bad.size()] = static_cast<char>(random());
      probe(bad);
    }
  }
  for (int round = 0; round < 2000; ++round) {
    std::string noise(random() % 64, '\0');
    for (char& c : noise) c = static_cast<char>(random());
    probe(noise);
  }
  EXPECT_GT(refused, 2000);
}

// Bytes written by hand: field 4 (forward_backward), inside it field 3 (loss).
TEST(Codec, BadFieldsAreNamed) {
  const auto refusal = [](const std::string& bytes) -> std::string {
    try {
      decode_request(bytes);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_THAT(refusal(std::string("\x22\x02\x18\x63", 4)), testing::HasSubstr("loss has the unknown value 99"));
  EXPECT_THAT(refusal(std::string("\x22\x05\x12\x03\x0a\x01z", 7)), testing::HasSubstr("tokens has 1 bytes"));
  EXPECT_THAT(refusal(""), testing::HasSubstr("no body"));
}

TEST(Codec, LanesFollowTheRules) {
  const auto bodies = all_requests();
  for (const RequestBody& body : bodies) {
    const std::size_t kind = body.index();
    EXPECT_EQ(lane_of(body), kind <= 7 ? Lane::training : kind <= 9 ? Lane::sampling : Lane::control) << kind;
  }
}

}  // namespace
}  // namespace ht::worker_protocol
