#include "base/logging.h"

#include <gmock/gmock.h>

#include "base/error.h"

namespace ht {
namespace {

TEST(Logging, WritesNameLevelAndMessageToStandardError) {
  init_logging("worker 3", "info");
  testing::internal::CaptureStderr();
  spdlog::debug("hidden");
  spdlog::info("loaded {} tensors", 7);
  spdlog::warn("slow");
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_THAT(text, testing::HasSubstr("worker 3 info: loaded 7 tensors\n"));
  EXPECT_THAT(text, testing::HasSubstr("worker 3 warning: slow\n"));
  EXPECT_THAT(text, testing::Not(testing::HasSubstr("hidden")));
}

TEST(Logging, RefusesAnUnknownLevelByName) {
  try {
    init_logging("x", "loud");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.category(), ErrorCategory::user);
    EXPECT_THAT(error.what(), testing::HasSubstr("\"loud\""));
  }
}

}  // namespace
}  // namespace ht
