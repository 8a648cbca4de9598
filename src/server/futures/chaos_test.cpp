// kill -9 of workers and servers at random instants under load. Three models train at once, their requests merged into
// micro-batches that depend on timing. At the end every request has exactly one outcome, the adapters are what an
// undisturbed run gives, no outcome that was told once is ever told differently, and the chain of compositions is
// unbroken: a replay executed the very micro-batches whose results had been delivered.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <random>
#include <sstream>

#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "base/logging.h"
#include "server/futures/test_rig.h"
#include "server/futures/toy_adapter.h"

namespace ht::futures::toy {
namespace {

namespace asio = boost::asio;
using std::chrono::milliseconds;

struct Planned {
  Submission submission;
  std::string wanted;  // part of its outcome's text
};
struct Turn {
  std::vector<Planned> requests;  // in the order of arrival
  std::vector<Planned> samples;   // after them
};

constexpr int kModels = 3;
constexpr int kTurns = 100;

std::string name_of(int model) {
  return "s:" + std::to_string(model);
}

// The same for the same model, whatever happened before.
std::vector<Turn> plan(int model, const std::filesystem::path& dir) {
  std::mt19937 random(static_cast<unsigned>(model));
  const auto below = [&](unsigned n) { return static_cast<int>(random() % n); };
  Adapter adapter = Adapter::fresh(static_cast<std::uint64_t>(model));
  const std::string name = name_of(model);
  std::int64_t seq = 0, samples = 0;
  std::vector<Turn> turns(kTurns);
  turns[0].requests.push_back({create(name, static_cast<std::uint64_t>(model)), "ok"});
  for (int t = 0; t < kTurns; ++t) {
    Turn& turn = turns[static_cast<std::size_t>(t)];
    std::vector<Planned> chunks;
    for (int chunk = 0; chunk <= below(3); ++chunk) {
      std::vector<std::vector<std::int32_t>> datums;
      for (int i = 0; i <= below(5); ++i) datums.push_back({below(1000) + 1, t, below(1000)});
      const bool forward_only = below(5) == 0;
      if (!forward_only) {
        for (const auto& datum : datums) adapter.backward(datum);
      }
      chunks.push_back({train(name, ++seq, datums, forward_only), fmt::format("g={:.0f} ", visible(adapter.g))});
    }
    // As the SDK sends the chunks of one call: the first one last.
    std::rotate(chunks.begin(), chunks.begin() + 1, chunks.end());
    for (Planned& chunk : chunks) turn.requests.push_back(std::move(chunk));
    adapter.step(0.001 * t);
    turn.requests.push_back({step(name, ++seq, 0.001 * t),
                             fmt::format("steps={:.0f} w={:.0f} ", static_cast<double>(t + 1), visible(adapter.w))});
    if (t % 5 == 2) {
      turn.requests.push_back({save(name, ++seq, dir / "saved" / (name + "-" + std::to_string(t))), "ok"});
    }
    if (t % 4 == 3) {
      const std::string version = name + "-v" + std::to_string(t);
      turn.requests.push_back({publish(name, ++seq, version, dir / "versions" / version), "ok"});
      for (int i = 0; i < 3; ++i) {
        const auto seed = static_cast<std::uint64_t>(below(100000));
        turn.samples.push_back({sample(name, ++samples, version, dir / "versions" / version, seed, 2),
                                fmt::format("[{},{}]", sampled(adapter.w, seed, 0), sampled(adapter.w, seed, 1))});
      }
    }
  }
  return turns;
}

// One client: it submits all from the start again (each request under its natural key) and polls all again.
class Client {
 public:
  Client(Rig& rig, int model, const std::filesystem::path& dir, std::ofstream* told)
      : rig_(rig), turns_(plan(model, dir)), told_(told) {}

  asio::awaitable<void> run() {
    std::vector<std::pair<const Planned*, std::string>> open;
    for (const Turn& turn : turns_) {
      for (const Planned& planned : turn.requests) open.emplace_back(&planned, submit(planned));
      if (turn.samples.empty() && open.size() < 12) continue;  // pipelined
      for (const auto& [planned, id] : std::exchange(open, {})) co_await check(*planned, id);
      for (const Planned& planned : turn.samples) open.emplace_back(&planned, submit(planned));
      ++turns_done;
    }
    for (const auto& [planned, id] : open) co_await check(*planned, id);
    check_chain();
    done = true;
  }

  int turns_done = 0;
  bool done = false;
  std::vector<std::string> errors;

 private:
  std::string submit(const Planned& planned) { return rig_.futures->submit(planned.submission).request_id; }

  asio::awaitable<void> check(const Planned& planned, const std::string& id) {
    for (;;) {
      const Poll poll = co_await rig_.futures->poll(id, std::chrono::seconds(20), {});
      if (poll.state == PollState::pending) continue;
      const std::string text = poll.state == PollState::done ? text_of(*poll.outcome) : "no outcome";
      if (told_ != nullptr) *told_ << id << ' ' << text << std::endl;
      if (text.find(planned.wanted) == std::string::npos) {
        errors.push_back(planned.submission.natural_key + ": wanted " + planned.wanted + ", got " + text);
      }
      if (planned.submission.operation == Operation::optim_step ||
          planned.submission.operation == Operation::forward_backward) {
        chain_[planned.submission.seq_id] = text;
      }
      co_return;
    }
  }

  static std::string field(const std::string& text, const std::string& name) {
    const auto at = text.find(name + "=");
    return at == std::string::npos ? "" : text.substr(at + name.size() + 1, text.find(' ', at) - at - name.size() - 1);
  }
  void check_chain() {
    std::string after;
    for (const auto& [seq, text] : chain_) {
      if (!after.empty() && field(text, "before") != after) {
        errors.push_back("the compositions before and after request " + std::to_string(seq) + " do not join");
      }
      after = field(text, "after");
    }
  }

  Rig& rig_;
  std::vector<Turn> turns_;
  std::ofstream* told_;
  std::map<std::int64_t, std::string> chain_;
};

RigOptions rig_options(const std::filesystem::path& dir) {
  RigOptions options;
  options.dir = dir;
  options.segment_bytes = 20000;
  options.backend_config = R"({"delay_us":1000,"compute":0.01})";
  options.dispatch.snapshot_after_seconds = 0.25;
  options.dispatch.snapshot_retry = milliseconds(5);
  options.dispatch.backoff_first = milliseconds(1);
  options.dispatch.backoff_max = milliseconds(5);
  options.dispatch.max_kills = 1 << 20;  // they are not the requests' fault
  options.dispatch.model_in_flight = 8;
  options.futures.memory_bytes = 2000;
  options.futures.housekeeping = milliseconds(20);
  return options;
}

struct Outcomes {
  bool finished = false;
  int kills = 0;
  int snapshots = 0;  // that were used
  std::vector<std::string> errors;
};

// Runs all clients; kills the worker every now and then.
Outcomes serve(const std::filesystem::path& dir, unsigned seed, int kills, std::ofstream* told) {
  std::mt19937 random(seed);
  Rig rig(rig_options(dir));
  std::vector<std::unique_ptr<Client>> clients;
  for (int model = 0; model < kModels; ++model) {
    clients.push_back(std::make_unique<Client>(rig, model, dir, told));
    asio::co_spawn(rig.io, clients.back()->run(), [](const std::exception_ptr& failure) {
      if (failure) std::rethrow_exception(failure);
    });
  }
  Outcomes outcomes;
  const auto next_kill = [&] { return std::chrono::steady_clock::now() + milliseconds(5 + random() % 50); };
  auto kill_at = next_kill();
  std::string snapshot;
  outcomes.finished = rig.run(
      [&] {
        if (outcomes.kills < kills && std::chrono::steady_clock::now() >= kill_at) {
          rig.kill_worker();
          ++outcomes.kills;
          kill_at = next_kill();
        }
        if (rig.dispatch->snapshot_of(kBase) != snapshot) {
          snapshot = rig.dispatch->snapshot_of(kBase);
          ++outcomes.snapshots;
        }
        return std::all_of(clients.begin(), clients.end(), [](const auto& client) { return client->done; });
      },
      std::chrono::seconds(60));
  for (const auto& client : clients) {
    outcomes.errors.insert(outcomes.errors.end(), client->errors.begin(), client->errors.end());
  }
  return outcomes;
}

class ChaosTest : public ::testing::Test {
 protected:
  ChaosTest() : dir_(std::filesystem::path(::testing::TempDir()) / ("chaos_test_" + std::to_string(::getpid()))) {
    spdlog::set_level(spdlog::level::off);
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  ~ChaosTest() override { std::filesystem::remove_all(dir_); }

  std::filesystem::path dir_;
};

TEST_F(ChaosTest, UndisturbedRun) {
  const Outcomes outcomes = serve(dir_, 1, 0, nullptr);
  EXPECT_TRUE(outcomes.finished);
  EXPECT_THAT(outcomes.errors, ::testing::IsEmpty());
}

TEST_F(ChaosTest, WorkersDieAtRandomInstants) {
  for (unsigned seed = 1; seed <= 3; ++seed) {
    const auto dir = dir_ / std::to_string(seed);
    const Outcomes outcomes = serve(dir, seed, 50, nullptr);
    EXPECT_TRUE(outcomes.finished) << "seed " << seed;
    EXPECT_THAT(outcomes.errors, ::testing::IsEmpty()) << "seed " << seed;
    EXPECT_GE(outcomes.kills, 5);
    EXPECT_GE(outcomes.snapshots, 3) << "seed " << seed;
  }
}

TEST_F(ChaosTest, ServersDieAtRandomInstants) {
  constexpr int kKills = 25;
  std::mt19937 random(99);
  const auto told_file = dir_ / "told";
  int status = -1, lives = 0;
  for (bool finished = false; !finished; ++lives) {
    ASSERT_LT(lives, kKills + 2);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      std::ofstream told(told_file, std::ios::app);
      int code = 2;
      try {
        const Outcomes outcomes = serve(dir_, static_cast<unsigned>(lives), lives % 2, &told);
        for (const auto& error : outcomes.errors) std::cerr << error << std::endl;
        code = outcomes.finished && outcomes.errors.empty() ? 0 : 1;
      } catch (const std::exception& error) {
        std::cerr << error.what() << std::endl;
      }
      ::_exit(code);
    }
    const auto life = milliseconds(lives < kKills ? 20 + static_cast<long>(random() % 80) : 60000);
    const auto end = std::chrono::steady_clock::now() + life;
    while (!finished && std::chrono::steady_clock::now() < end) {
      finished = ::waitpid(child, &status, WNOHANG) == child;
      if (!finished) ::usleep(1000);
    }
    if (finished) break;
    ::kill(child, SIGKILL);
    ::waitpid(child, &status, 0);
  }
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_GE(lives, 5);
  // What one server told, the next one repeated.
  std::map<std::string, std::string> outcomes;
  std::ifstream told(told_file);
  std::size_t repeated = 0;
  for (std::string line; std::getline(told, line);) {
    const auto space = line.find(' ');
    const auto [known, fresh] = outcomes.emplace(line.substr(0, space), line.substr(space));
    repeated += fresh ? 0 : 1;
    EXPECT_EQ(known->second, line.substr(space)) << line.substr(0, space);
  }
  EXPECT_GT(repeated, 0u);
}

}  // namespace
}  // namespace ht::futures::toy
