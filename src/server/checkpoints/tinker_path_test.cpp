#include <gmock/gmock.h>

#include "base/error.h"
#include "server/checkpoints/checkpoints.h"

namespace ht::checkpoints {
namespace {

std::string refusal(std::string_view text) {
  try {
    TinkerPath::parse(text);
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
    return error.what();
  }
  return "accepted";
}

TEST(TinkerPath, ComesBack) {
  for (const char* text : {"tinker://3f1c-0a:train:0/weights/0001", "tinker://r/sampler_weights/step 10.final-x_"}) {
    EXPECT_EQ(TinkerPath::parse(text).str(), text);
  }
  const TinkerPath path = TinkerPath::parse("tinker://a:train:2/sampler_weights/n");
  EXPECT_EQ(path.run, "a:train:2");
  EXPECT_EQ(path.kind, Kind::sampler_weights);
  EXPECT_EQ(path.checkpoint_id(), "sampler_weights/n");
  EXPECT_EQ(type_of(path.kind), "sampler");
  EXPECT_EQ(type_of(Kind::weights), "training");
}

TEST(TinkerPath, BadOnesAreRefusedWithTheForm) {
  using testing::HasSubstr;
  for (const char* text :
       {"", "r/weights/n", "http://r/weights/n", "tinker://", "tinker://r", "tinker://r/weights", "tinker:///weights/n",
        "tinker://../weights/n", "tinker://a b/weights/n", "tinker://r/optimizer/n", "tinker://r/external_weights/n"}) {
    EXPECT_THAT(refusal(text), HasSubstr("the form is tinker://<training run>")) << text;
  }
  for (const char* text : {"tinker://r/weights/", "tinker://r/weights/a/b", "tinker://r/weights/..",
                           "tinker://r/weights/.hidden", "tinker://r/weights/a~b", "tinker://r/weights/\xc3\xa9"}) {
    EXPECT_THAT(refusal(text), HasSubstr("is not allowed")) << text;
  }
  EXPECT_THAT(refusal("tinker://r/weights/" + std::string(128, 'x')), "accepted");
  EXPECT_THAT(refusal("tinker://r/weights/" + std::string(129, 'x')), HasSubstr("1 to 128"));
  EXPECT_THROW(check_name(std::string_view("a\0b", 3)), Error);
}

}  // namespace
}  // namespace ht::checkpoints
