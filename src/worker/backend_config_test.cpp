#include "worker/backend_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"

namespace ht::worker {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::string refusal(const std::string& text) {
  try {
    parse_backend_config(text);
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
    return error.what();
  }
  return "accepted";
}

TEST(BackendConfig, EveryKeyIsRead) {
  const BackendConfig config = parse_backend_config(
      R"({"micro_batch_tokens": 100, "recompute": "block", "prefill_chunk_tokens": 64, "max_sampling_sequences": 3,
          "kv_cache_tokens": 160, "sampling_share": 0.25, "device": "cpu", "adapter_bytes": 5000000000})");
  EXPECT_EQ(config.micro_batch_tokens, 100);
  EXPECT_EQ(config.recompute, engine::Recompute::block);
  EXPECT_EQ(config.prefill_chunk_tokens, 64);
  EXPECT_EQ(config.max_sampling_sequences, 3);
  EXPECT_EQ(config.kv_cache_tokens, 160);
  EXPECT_EQ(config.sampling_share, 0.25);
  EXPECT_EQ(config.device, "cpu");
  EXPECT_EQ(config.adapter_bytes, 5'000'000'000u);
  for (const char* empty : {"", "{}"}) EXPECT_EQ(parse_backend_config(empty).micro_batch_tokens, 2048);
}

TEST(BackendConfig, EveryWrongValueIsNamedWithWhatIsAllowed) {
  struct Case {
    const char *text, *key, *value, *allowed;
  };
  for (const Case& wrong :
       std::vector<Case>{{R"({"micro_batch_tokens": 0})", "micro_batch_tokens", "0", "from 1"},
                         {R"({"micro_batch_tokens": 1.5})", "micro_batch_tokens", "1.5", "whole numbers"},
                         {R"({"micro_batch_tokens": "many"})", "micro_batch_tokens", "many", "whole numbers"},
                         {R"({"prefill_chunk_tokens": -1})", "prefill_chunk_tokens", "-1", "from 1"},
                         {R"({"max_sampling_sequences": 65537})", "max_sampling_sequences", "65537", "65536"},
                         {R"({"kv_cache_tokens": 15})", "kv_cache_tokens", "15", "from 16"},
                         {R"({"kv_cache_tokens": 1e30})", "kv_cache_tokens", "1E30", "2147483647"},
                         {R"({"recompute": "all"})", "recompute", "all", "none, norms_mlp, block"},
                         {R"({"recompute": 1})", "recompute", "1", "none, norms_mlp, block"},
                         {R"({"adapter_bytes": 0})", "adapter_bytes", "0", "1 to"},
                         {R"({"device": "tpu"})", "device", "tpu", "auto, cpu, cuda"},
                         {R"({"device": 0})", "device", "0", "auto, cpu, cuda"},
                         {R"({"sampling_share": 1})", "sampling_share", "1", "0.05 to 0.95"},
                         {R"({"sampling_share": null})", "sampling_share", "null", "0.05 to 0.95"},
                         {R"({"colour": 1})", "colour", "unknown", "kv_cache_tokens"}}) {
    EXPECT_THAT(refusal(wrong.text), AllOf(HasSubstr(wrong.key), HasSubstr(wrong.value), HasSubstr(wrong.allowed)));
  }
  for (const char* text : {"[]", "{", "1"}) EXPECT_THAT(refusal(text), HasSubstr("not a JSON object")) << text;
}

}  // namespace
}  // namespace ht::worker
