#include "server/sessions/sessions.h"

#include <gmock/gmock.h>

#include <regex>
#include <thread>

#include "base/error.h"
#include "server/store/database.h"

namespace ht::sessions {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

class SessionsTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "ht_sessions_XXXXXX").string();
    dir = ::mkdtemp(pattern.data());
    restart();
  }
  void TearDown() override {
    sessions.reset();
    database.reset();
    fs::remove_all(dir);
  }
  void restart() {
    sessions.reset();
    database.reset();
    database = std::make_unique<store::Database>(dir / "store.sqlite");
    sessions = make_sessions(*database);
  }
  std::string create() { return sessions->create_session({}, "").id; }
  std::string refusal(const std::string& id) {
    try {
      sessions->active_session(id);
    } catch (const Error& error) {
      EXPECT_EQ(error.category(), ErrorCategory::user);
      return error.what();
    }
    return "active";
  }

  fs::path dir;
  std::unique_ptr<store::Database> database;
  std::unique_ptr<Sessions> sessions;
};

TEST_F(SessionsTest, IdsAreUuids) {
  const std::regex uuid("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}");
  const std::string id = create();
  EXPECT_TRUE(std::regex_match(id, uuid)) << id;
  EXPECT_NE(create(), id);
}

TEST_F(SessionsTest, SessionsSurviveARestartWhole) {
  Session fields;
  fields.tags = {"a", "b \"c\""};
  fields.user_metadata = R"({"k":"v"})";
  fields.project_id = "p";
  fields.display_name = "d";
  fields.sdk_version = "0.38.0";
  const Session made = sessions->create_session(fields, "key");
  EXPECT_EQ(sessions->create_session({}, "key").id, made.id);
  EXPECT_NE(sessions->create_session({}, "other").id, made.id);
  restart();
  const Session kept = sessions->find_session(made.id).value();
  EXPECT_THAT(kept.tags, ElementsAre("a", "b \"c\""));
  EXPECT_EQ(kept.user_metadata, fields.user_metadata);
  EXPECT_EQ(kept.project_id, "p");
  EXPECT_EQ(kept.display_name, "d");
  EXPECT_EQ(kept.sdk_version, "0.38.0");
  EXPECT_EQ(kept.created_at, made.created_at);
  EXPECT_EQ(kept.state, SessionState::active);
  EXPECT_EQ(sessions->create_session({}, "key").id, made.id);
}

TEST_F(SessionsTest, ListIsNewestFirstInPages) {
  const std::string a = create(), b = create(), c = create();
  const auto ids = [&](std::size_t limit, std::size_t offset) {
    std::vector<std::string> result;
    for (const Session& s : sessions->list_sessions(limit, offset)) result.push_back(s.id);
    return result;
  };
  EXPECT_THAT(ids(2, 0), ElementsAre(c, b));
  EXPECT_THAT(ids(9, 1), ElementsAre(b, a));
  EXPECT_THAT(ids(9, 3), ElementsAre());
  restart();
  EXPECT_THAT(ids(9, 0), ElementsAre(c, b, a));
}

TEST_F(SessionsTest, FirstFinishWins) {
  const std::string id = create();
  std::vector<std::string> ended;
  sessions->on_end([&](const Session& s, const std::string& reason) {
    EXPECT_EQ(s.state, SessionState::finished);
    ended.push_back(s.id + " " + reason);
    throw server_error("a listener's trouble stops nobody");
  });
  sessions->on_end([&](const Session&, const std::string&) { ended.push_back("second"); });
  EXPECT_TRUE(sessions->heartbeat(id));
  sessions->finish(id, "errored", "why");
  sessions->finish(id, "success", "");
  EXPECT_THAT(ended, ElementsAre(id + " errored", "second"));
  EXPECT_FALSE(sessions->heartbeat(id));
  EXPECT_THAT(refusal(id), HasSubstr("finished (errored)"));
  restart();
  EXPECT_EQ(sessions->find_session(id)->finish_reason, "errored");
  EXPECT_FALSE(sessions->heartbeat(id));
  EXPECT_THAT(refusal("nobody"), HasSubstr("no session nobody"));
  EXPECT_THROW(sessions->finish("nobody", "success", ""), Error);
}

TEST_F(SessionsTest, SilenceExpiresDowntimeDoesNot) {
  using namespace std::chrono_literals;
  const std::string id = create();
  sessions->expire(1s);
  EXPECT_EQ(refusal(id), "active");
  std::this_thread::sleep_for(1100ms);
  restart();  // down for longer than the timeout
  sessions->expire(1s);
  EXPECT_EQ(refusal(id), "active");
  std::this_thread::sleep_for(600ms);
  EXPECT_TRUE(sessions->heartbeat(id));
  const std::string silent = create();
  std::this_thread::sleep_for(600ms);
  EXPECT_TRUE(sessions->heartbeat(id));
  std::this_thread::sleep_for(600ms);
  std::vector<std::string> ended;
  sessions->on_end([&](const Session& s, const std::string& reason) { ended.push_back(s.id + " " + reason); });
  sessions->expire(1s);
  EXPECT_THAT(ended, ElementsAre(silent + " expired"));
  EXPECT_EQ(refusal(id), "active");
  EXPECT_THAT(refusal(silent), HasSubstr("expired"));
  restart();
  EXPECT_THAT(refusal(silent), HasSubstr("expired"));
}

TEST_F(SessionsTest, HeartbeatsAreNotWrittenOneByOne) {
  const std::string id = create();
  const auto version = [&] { return store::integer_of(database->query("SELECT total_changes()")[0][0]); };
  const std::int64_t before = version();
  for (int i = 0; i < 100; ++i) sessions->heartbeat(id);
  EXPECT_EQ(version(), before);
  const auto last = sessions->find_session(id)->last_heartbeat;
  restart();  // an orderly end writes them
  EXPECT_EQ(sessions->find_session(id)->last_heartbeat, last);
}

TEST_F(SessionsTest, ModelsAreTheFirstOfTheirNumber) {
  const std::string id = create();
  Model model;
  model.session_id = id;
  model.model_seq_id = 3;
  model.base_model = "Qwen/Qwen3-8B";
  model.base_dir = "/models/q";
  model.lora = {.rank = 64, .seed = 0xffffffffffffffff, .train_attn = true, .train_mlp = false, .train_unembed = true};
  model.user_metadata = R"({"renderer":"qwen3"})";
  const Model made = sessions->create_model(model);
  EXPECT_EQ(made.id, id + ":train:3");
  Model other = model;
  other.base_model = "else";
  EXPECT_EQ(sessions->create_model(other).base_model, "Qwen/Qwen3-8B");
  other.model_seq_id = 1;
  EXPECT_EQ(sessions->create_model(other).id, id + ":train:1");
  sessions->touch_model(made.id);
  sessions->touch_model("unknown");
  restart();
  const Model kept = sessions->find_model(made.id).value();
  EXPECT_EQ(kept.lora, model.lora);
  EXPECT_EQ(kept.base_dir, "/models/q");
  EXPECT_EQ(kept.user_metadata, model.user_metadata);
  EXPECT_EQ(kept.created_at, made.created_at);
  EXPECT_GE(kept.last_request, made.last_request);
  EXPECT_THAT(sessions->models_of(id), ElementsAre(made.id, id + ":train:1"));
  std::size_t total = 0;
  const auto listed = sessions->list_models(1, 0, &total);
  ASSERT_EQ(listed.size(), 1u);
  EXPECT_EQ(listed[0].id, id + ":train:1");
  EXPECT_EQ(total, 2u);
  EXPECT_FALSE(sessions->find_model("x"));
  model.session_id = "nobody";
  EXPECT_THROW(sessions->create_model(model), Error);
}

TEST_F(SessionsTest, SamplersAreTheFirstOfTheirId) {
  const std::string id = create();
  const Sampler made = sessions->create_sampler({.id = id + ":sample:0",
                                                 .session_id = id,
                                                 .base_model = "b",
                                                 .base_dir = "/b",
                                                 .model_path = "tinker://r/weights/n",
                                                 .version = "v",
                                                 .version_dir = "/v"});
  EXPECT_EQ(sessions->create_sampler({.id = made.id, .session_id = id}).version, "v");
  restart();
  const Sampler kept = sessions->find_sampler(made.id).value();
  EXPECT_EQ(kept.base_model, "b");
  EXPECT_EQ(kept.base_dir, "/b");
  EXPECT_EQ(kept.model_path, "tinker://r/weights/n");
  EXPECT_EQ(kept.version, "v");
  EXPECT_EQ(kept.version_dir, "/v");
  EXPECT_THAT(sessions->samplers_of(id), ElementsAre(made.id));
  EXPECT_THAT(sessions->samplers_of("nobody"), ElementsAre());
  EXPECT_THROW(sessions->create_sampler({.id = "x:sample:1", .session_id = "x"}), Error);
}

TEST_F(SessionsTest, WhatIsLongOverIsForgotten) {
  const std::string over = create(), with_checkpoint = create(), active = create();
  for (const std::string& id : {over, with_checkpoint, active}) {
    sessions->create_model({.session_id = id, .model_seq_id = 0});
    sessions->create_model({.session_id = id, .model_seq_id = 1});
    sessions->create_sampler({.id = id + ":sample:0", .session_id = id});
  }
  sessions->finish(over, "success", "");
  sessions->finish(with_checkpoint, "success", "");
  const auto kept = [&](const std::string& model) { return model == with_checkpoint + ":train:1"; };
  sessions->forget(std::chrono::hours(1), kept);
  EXPECT_TRUE(sessions->find_session(over));
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  sessions->forget(std::chrono::seconds(0), kept);
  for (int round = 0; round < 2; ++round) {
    EXPECT_FALSE(sessions->find_session(over));
    EXPECT_FALSE(sessions->find_model(over + ":train:0"));
    EXPECT_TRUE(sessions->find_session(with_checkpoint));
    EXPECT_THAT(sessions->models_of(with_checkpoint), ElementsAre(with_checkpoint + ":train:1"));
    EXPECT_FALSE(sessions->find_sampler(with_checkpoint + ":sample:0"));
    EXPECT_TRUE(sessions->find_sampler(active + ":sample:0"));
    std::size_t total = 0;
    EXPECT_EQ(sessions->list_models(10, 0, &total).size(), 3u);
    EXPECT_EQ(total, 3u);
    EXPECT_EQ(sessions->list_sessions(10, 0).size(), 2u);
    restart();
  }
}

TEST_F(SessionsTest, AVersionIsInUseAsLongAsASessionOfItsSamplersGoesOn) {
  const std::string a = create(), b = create();
  sessions->create_sampler({.id = a + ":sample:0", .session_id = a, .version = "v"});
  sessions->create_sampler({.id = b + ":sample:0", .session_id = b, .version = "v"});
  bool at_end = true;
  sessions->on_end([&](const Session&, const std::string&) { at_end = sessions->version_in_use("v"); });
  sessions->finish(a, "success", "");
  EXPECT_TRUE(at_end);
  sessions->finish(b, "success", "");
  EXPECT_FALSE(at_end);
  restart();
  EXPECT_FALSE(sessions->version_in_use("v"));
}

TEST_F(SessionsTest, AnEndThatCouldNotBeWrittenIsWrittenLater) {
  const std::string id = create();
  database->execute("ALTER TABLE sessions RENAME TO hidden");
  sessions->finish(id, "success", "");
  EXPECT_THAT(refusal(id), HasSubstr("over"));
  EXPECT_THROW(sessions->expire(std::chrono::hours(1)), Error);
  database->execute("ALTER TABLE hidden RENAME TO sessions");
  sessions->expire(std::chrono::hours(1));
  restart();
  EXPECT_THAT(refusal(id), HasSubstr("finished (success)"));
}

}  // namespace
}  // namespace ht::sessions
