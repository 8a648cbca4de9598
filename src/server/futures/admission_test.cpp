// How much work may wait, and what is said when it is too much.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "server/futures/test_rig.h"

namespace ht::futures::toy {
namespace {

using ::testing::HasSubstr;

class AdmissionTest : public RigTest {
 protected:
  // "": it was accepted.
  std::string refusal(Submission submission) {
    try {
      submit(std::move(submission));
      return "";
    } catch (const Busy& busy) {
      return busy.what();
    }
  }
};

TEST_F(AdmissionTest, TooManySamplesAreRefused) {
  options_.futures.max_queued_samples = 3;
  options_.model_dir = "";  // never ready
  start();
  for (int i = 0; i < 3; ++i) submit(sample("s", i, "", "", 5));
  EXPECT_THROW(submit(sample("s", 3, "", "", 5)), Busy);
  submit(sample("s", 1, "", "", 5));  // a repeated one is no new one
}

TEST_F(AdmissionTest, ParkedRequestsOfAModelAreCountedAndTheMissingOneIsTaken) {
  options_.futures.max_model_requests = 4;
  start();
  rig_->text(submit(create("s:m", 7)));
  std::string last;
  for (int seq = 2; seq <= 5; ++seq) last = submit(step("s:m", seq, 1));
  EXPECT_THAT(refusal(step("s:m", 6, 1)), HasSubstr("4 of training requests of this model"));
  EXPECT_EQ(refusal(step("s:m", 3, 1)), "");  // a repeated one
  EXPECT_EQ(refusal(create("s:n", 8)), "");   // another model
  start();                                    // the journal knows them
  EXPECT_THAT(refusal(step("s:m", 6, 1)), HasSubstr("at most 4"));
  EXPECT_EQ(refusal(step("s:m", 1, 1)), "");
  EXPECT_THAT(rig_->text(last), HasSubstr("steps=5"));
  EXPECT_EQ(refusal(step("s:m", 6, 1)), "");
}

TEST_F(AdmissionTest, RequestsInARowAreLimitedToo) {
  options_.futures.max_model_requests = 4;
  options_.model_dir = "";  // never ready
  start();
  for (int seq = 0; seq < 4; ++seq) submit(seq == 0 ? create("s:m", 7) : step("s:m", seq, 1));
  EXPECT_THAT(refusal(step("s:m", 4, 1)), HasSubstr("of this model"));
}

TEST_F(AdmissionTest, BytesOfAModelAndOfAllAreLimited) {
  options_.futures.max_model_bytes = 20000;
  options_.futures.max_bytes = 30000;
  options_.futures.max_requests = 100;
  options_.model_dir = "";  // never ready
  start();
  const std::vector<std::vector<std::int32_t>> datum(1, std::vector<std::int32_t>(1000, 1000000));
  submit(create("s:m", 7));
  submit(create("s:n", 8));
  std::string refused;
  int seq = 0;
  while (refused.empty()) refused = refusal(train("s:m", ++seq, datum));
  EXPECT_THAT(refused, HasSubstr("bytes of training requests of this model"));
  EXPECT_GT(seq, 1);
  refused.clear();
  seq = 0;
  while (refused.empty()) refused = refusal(train("s:n", ++seq, datum));
  EXPECT_THAT(refused, HasSubstr("at most 30000"));
  refused.clear();
  while (refused.empty()) refused = refusal(sample("s", ++seq, "", "", 5));
  EXPECT_THAT(refused, HasSubstr("and samples"));
}

TEST_F(AdmissionTest, RequestsOfAllModelsAreLimited) {
  options_.futures.max_requests = 5;
  options_.model_dir = "";  // never ready
  start();
  for (int model = 0; model < 5; ++model) submit(create("s:" + std::to_string(model), 7));
  EXPECT_THAT(refusal(step("s:1", 1, 1)), HasSubstr("of all models"));
  EXPECT_THAT(refusal(create("s:6", 7)), HasSubstr("at most 5"));
}

TEST_F(AdmissionTest, ARequestTooLargeForTheJournalFailsAndTheNextRuns) {
  options_.max_record_bytes = 10000;
  start();
  submit(create("s:m", 7));
  const std::vector<std::vector<std::int32_t>> large(1, std::vector<std::int32_t>(10000, 1));
  const std::string told = rig_->text(submit(train("s:m", 1, large)));
  EXPECT_THAT(told, HasSubstr("user: the request has "));
  EXPECT_THAT(told, HasSubstr("at most 10000"));
  EXPECT_THAT(rig_->text(submit(step("s:m", 2, 1))), HasSubstr("steps=1"));
}

}  // namespace
}  // namespace ht::futures::toy
