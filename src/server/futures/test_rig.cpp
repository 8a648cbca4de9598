#include "server/futures/test_rig.h"

#include <signal.h>
#include <unistd.h>

#include <fmt/format.h>

#include "base/logging.h"

namespace ht::futures::toy {

namespace asio = boost::asio;
namespace wp = worker_protocol;

namespace {

Result metrics_text(const std::map<std::string, double>& metrics) {
  std::string text;
  for (const auto& [name, value] : metrics) text += fmt::format("{}={:.0f} ", name.substr(0, name.find(':')), value);
  return {"text/plain", text};
}

Outcome complete(const std::string&, const Submission& submission, const wp::DoneBody& body) {
  if (const auto* train = std::get_if<wp::TrainResult>(&body)) {
    // The work is there, whether it was held or read again.
    const auto& batch = std::get<wp::ForwardBackward>(submission.work).batch;
    Result result = metrics_text(train->metrics);
    result.body += fmt::format("tokens={} ", batch.tokens.size());
    return result;
  }
  if (const auto* step = std::get_if<wp::OptimResult>(&body)) return metrics_text(step->metrics);
  if (const auto* sample = std::get_if<wp::SampleResult>(&body)) {
    std::string text;
    for (const auto& sequence : sample->sequences) text += fmt::format("[{}] ", fmt::join(sequence.tokens, ","));
    return Result{"text/plain", text};
  }
  return Result{"text/plain", "ok " + submission.context};
}

Submission submission(Operation operation, const std::string& model, std::int64_t seq, wp::RequestBody work) {
  Submission made;
  made.operation = operation;
  made.session_id = model.substr(0, model.find(':'));
  made.model_id = model;
  made.seq_id = seq;
  made.base_dir = kBase;
  made.natural_key = fmt::format("{}/{}", model, seq);
  made.fingerprint = fmt::format("{}", static_cast<int>(operation));
  made.context = made.natural_key;
  made.work = std::move(work);
  return made;
}

}  // namespace

Rig::Rig(RigOptions options) {
  std::filesystem::create_directories(options.dir);
  options.dispatch.snapshot_dir = options.dir / "snapshots";
  dispatch::GroupOptions group;
  group.base_dir = kBase;
  group.name = "toy";
  group.worker_program = HT_TOY_WORKER;
  group.initialize.model_dir = options.model_dir;
  group.initialize.backend_config = options.backend_config;
  options.futures.data_dir = options.dir;
  journal.emplace(store::JournalOptions{options.dir / "journal", options.segment_bytes, options.max_record_bytes});
  dispatch.emplace(io, options.dispatch, std::vector{group});
  futures = make_futures(io, *journal, *dispatch, options.futures);
  for (int operation = 1; operation <= 8; ++operation) {
    futures->set_completion(static_cast<Operation>(operation), complete);
  }
  futures->recover();
  dispatch->start();
}

Rig::~Rig() {
  dispatch->stop();
  futures.reset();
  dispatch.reset();
}

bool Rig::run(const std::function<bool()>& until, std::chrono::seconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!until()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    io.restart();
    io.run_one_for(std::chrono::milliseconds(20));
  }
  return true;
}

Poll Rig::poll_once(const std::string& request_id, std::chrono::milliseconds timeout) {
  std::optional<Poll> answer;
  asio::co_spawn(
      io, [&]() -> asio::awaitable<void> { answer = co_await futures->poll(request_id, timeout, {}); }, asio::detached);
  run([&] { return answer.has_value(); }, std::chrono::seconds(60));
  return answer.value();
}

Outcome Rig::result(const std::string& request_id) {
  const Poll poll = poll_once(request_id, std::chrono::seconds(30));
  if (poll.state != PollState::done) return Failed{ErrorCategory::unknown, "no result"};
  return *poll.outcome;
}

std::string text_of(const Outcome& outcome) {
  if (const auto* result = std::get_if<Result>(&outcome)) return result->body;
  const auto& failed = std::get<Failed>(outcome);
  static constexpr const char* kNames[] = {"user", "server", "unknown"};
  return fmt::format("{}: {}", kNames[static_cast<int>(failed.category)], failed.message);
}

std::string Rig::text(const std::string& request_id) {
  return text_of(result(request_id));
}

void Rig::kill_worker() {
  const int pid = dispatch->status(kBase).pid;
  if (pid > 0) ::kill(pid, SIGKILL);
}

RigTest::RigTest() {
  spdlog::set_level(spdlog::level::off);
  const std::string suite = ::testing::UnitTest::GetInstance()->current_test_info()->test_suite_name();
  options_.dir = std::filesystem::path(::testing::TempDir()) / (suite + std::to_string(::getpid()));
  options_.dispatch.backoff_first = std::chrono::milliseconds(1);
  std::filesystem::remove_all(options_.dir);
}

RigTest::~RigTest() {
  rig_.reset();
  std::filesystem::remove_all(options_.dir);
}

void RigTest::start() {
  rig_.reset();
  rig_ = std::make_unique<Rig>(options_);
}

Submission create(const std::string& model, std::uint64_t seed) {
  wp::CreateAdapter work;
  work.adapter = model;
  work.lora.seed = seed;
  return submission(Operation::create_model, model, 0, work);
}

Submission train(const std::string& model, std::int64_t seq, std::vector<std::vector<std::int32_t>> datums,
                 bool forward_only) {
  wp::ForwardBackward work;
  work.adapter = model;
  work.forward_only = forward_only;
  work.batch.cu_seqlens.push_back(0);
  for (const auto& datum : datums) {
    work.batch.tokens.insert(work.batch.tokens.end(), datum.begin(), datum.end());
    work.batch.cu_seqlens.push_back(static_cast<std::int32_t>(work.batch.tokens.size()));
    work.batch.target_width.push_back(1);
  }
  work.batch.targets = work.batch.tokens;
  return submission(forward_only ? Operation::forward : Operation::forward_backward, model, seq, work);
}

Submission step(const std::string& model, std::int64_t seq, double learning_rate) {
  wp::OptimStep work;
  work.adapter = model;
  work.adam.learning_rate = learning_rate;
  return submission(Operation::optim_step, model, seq, work);
}

Submission save(const std::string& model, std::int64_t seq, const std::filesystem::path& dir) {
  return submission(Operation::save_weights, model, seq, wp::SaveAdapter{model, dir.string(), true});
}

Submission load(const std::string& model, std::int64_t seq, const std::filesystem::path& dir) {
  return submission(Operation::load_weights, model, seq, wp::LoadAdapter{model, dir.string(), true});
}

Submission create_from(const std::string& model, const std::filesystem::path& dir) {
  wp::CreateAdapter work;
  work.adapter = model;
  work.load_dir = dir.string();
  return submission(Operation::load_weights, model, 0, work);
}

Submission publish(const std::string& model, std::int64_t seq, const std::string& version,
                   const std::filesystem::path& dir) {
  return submission(Operation::save_weights_for_sampler, model, seq, wp::PublishVersion{model, version, dir.string()});
}

Submission sample(const std::string& session, std::int64_t seq, const std::string& version,
                  const std::filesystem::path& dir, std::uint64_t seed, int max_tokens) {
  wp::Sample work;
  work.version = version;
  work.version_dir = dir.string();
  work.prompt = {1, 2, 3};
  work.params.seed = seed;
  work.params.max_tokens = max_tokens;
  Submission made = submission(Operation::sample, "", 0, work);
  made.session_id = session;
  made.natural_key = fmt::format("sample/{}/{}", session, seq);
  made.context = made.natural_key;
  return made;
}

}  // namespace ht::futures::toy
