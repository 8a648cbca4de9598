// For tests: a worker process that speaks the whole protocol and trains toy adapters. Like the real one it merges
// requests of several adapters into micro-batches that depend on what happens to be queued, writes a version's files
// behind, and answers on three streams that overtake each other.

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <thread>

#include "server/futures/toy_adapter.h"
#include "worker_protocol/codec.h"

namespace ht::futures::toy {
namespace {

namespace wp = worker_protocol;

struct Queued {
  wp::Request request;
  int next_datum = 0;
  wp::TrainResult result;
};

struct State {
  Adapter adapter;
  wp::RequestId last_request = 0;
};

class Worker {
 public:
  explicit Worker(std::array<int, 3> fds) : fds_(fds) {}

  int run() {
    for (;;) {
      if (!read_lanes(idle() ? 1000 : 0)) return 0;
      work();
    }
  }

 private:
  bool idle() const { return pending_ == 0 && samples_.empty() && behind_.empty(); }

  bool read_lanes(int timeout_ms) {
    std::array<pollfd, 3> polled{};
    for (std::size_t i = 0; i < 3; ++i) polled[i] = {fds_[i], POLLIN, 0};
    if (::poll(polled.data(), 3, timeout_ms) <= 0) return true;
    for (std::size_t i = 0; i < 3; ++i) {
      if (polled[i].revents == 0) continue;
      std::array<char, 65536> bytes{};
      const ssize_t n = ::read(fds_[i], bytes.data(), bytes.size());
      if (n <= 0) return false;
      readers_[i].feed({bytes.data(), static_cast<std::size_t>(n)});
      while (auto payload = readers_[i].next()) accept(wp::decode_request(*payload));
    }
    return true;
  }

  void reply(wp::Lane lane, wp::Reply message) {
    const std::string bytes = wp::frame(wp::encode(message));
    std::size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t n = ::write(fds_[static_cast<std::size_t>(lane)], bytes.data() + done, bytes.size() - done);
      if (n <= 0) std::exit(0);
      done += static_cast<std::size_t>(n);
    }
  }
  void done(wp::Lane lane, wp::RequestId id, wp::DoneBody body) { reply(lane, {id, wp::Done{std::move(body)}}); }
  void fail(wp::Lane lane, wp::RequestId id, const std::string& why) {
    reply(lane, {id, wp::Failure{ErrorCategory::user, why}});
  }

  void accept(wp::Request request) {
    const wp::Lane lane = wp::lane_of(request.body);
    if (auto* replay = std::get_if<wp::Replay>(&request.body)) {
      replay_.insert(replay_.end(), replay->micro_batches.begin(), replay->micro_batches.end());
      done(lane, request.id, wp::Ack{});
    } else if (lane == wp::Lane::training) {
      std::string adapter = std::visit(
          [](const auto& body) {
            if constexpr (requires { body.adapter; }) return std::string(body.adapter);
            return std::string();
          },
          request.body);
      queues_[adapter].push_back({std::move(request), 0, {}});
      ++pending_;
    } else if (const auto* drop = std::get_if<wp::DropVersion>(&request.body)) {
      versions_.erase(drop->version);
      done(lane, request.id, wp::Ack{});
    } else if (lane == wp::Lane::sampling) {
      samples_.push_back(std::move(request));
    } else {
      control(request);
    }
  }

  void control(const wp::Request& request) {
    const wp::Lane lane = wp::Lane::control;
    if (const auto* initialize = std::get_if<wp::Initialize>(&request.body)) {
      std::sscanf(initialize->backend_config.c_str(), R"({"delay_us":%d,"compute":%lf})", &delay_us_, &compute_);
      reply(lane, {request.id, wp::Progress{0.5, "half of it"}});
      if (initialize->model_dir.empty()) return fail(lane, request.id, "no such model");
      done(lane, request.id, wp::WorkerInfo{128, "toy", ""});
    } else if (std::holds_alternative<wp::Snapshot>(request.body)) {
      snapshots_.push_back(request);
    } else if (const auto* restore = std::get_if<wp::Restore>(&request.body)) {
      if (!adapters_.empty() || pending_ > 0) return fail(lane, request.id, "a restore comes first");
      std::ifstream in(restore->dir + "/toy");
      std::string kind, name;
      State state;
      while (in >> kind >> name >> state.adapter.w >> state.adapter.g >> state.adapter.steps >> state.adapter.chain >>
             state.last_request) {
        if (kind == "adapter") adapters_[name] = state;
        if (kind == "version") {
          versions_[name] = state.adapter.w;
          on_disk_.insert(name);
        }
      }
      if (kind != "end") return fail(lane, request.id, "incomplete snapshot " + restore->dir);
      done(lane, request.id, wp::Ack{});
    } else if (std::holds_alternative<wp::Status>(request.body)) {
      wp::StatusResult status;
      status.micro_batches = micro_batches_;
      done(lane, request.id, status);
    } else if (const auto* cancel = std::get_if<wp::Cancel>(&request.body)) {
      cancelled_.insert(cancel->target);
      done(lane, request.id, wp::Ack{});
    } else {
      done(lane, request.id, wp::Ack{});
    }
  }

  // One turn: what is not a batch runs at once, then one micro-batch, one sample, one file.
  void work() {
    for (auto& [adapter, queue] : queues_) {
      while (!queue.empty() && !is_batch(queue.front().request)) {
        plain(queue.front().request);
        queue.pop_front();
        --pending_;
      }
    }
    micro_batch();
    if (!samples_.empty()) {
      sample(samples_.front());
      samples_.pop_front();
    }
    snapshot();
    if (!behind_.empty() && ++turns_ % 4 == 0) {
      write_version(behind_.front().first, behind_.front().second);
      behind_.pop_front();
    }
  }

  static void write_toy(const std::string& dir, const Adapter& adapter) {
    std::ofstream(dir + "/toy") << adapter.w << ' ' << adapter.g << ' ' << adapter.steps << ' ' << adapter.chain
                                << '\n';
  }
  static bool read_toy(const std::string& dir, Adapter& adapter) {
    std::ifstream in(dir + "/toy");
    return static_cast<bool>(in >> adapter.w >> adapter.g >> adapter.steps >> adapter.chain);
  }
  void write_version(const std::string& version, const std::string& dir) {
    if (const auto found = versions_.find(version); found != versions_.end()) write_toy(dir, {found->second, 0, 0, 0});
    on_disk_.insert(version);
  }

  // A batch that can run. One of an adapter that is not here is refused in its turn, like an op.
  bool is_batch(const wp::Request& request) const {
    const auto* body = std::get_if<wp::ForwardBackward>(&request.body);
    return body != nullptr && body->batch.tokens[0] != kRefused && adapters_.contains(body->adapter);
  }

  void plain(const wp::Request& request) {
    const wp::Lane lane = wp::Lane::training;
    if (const auto* create = std::get_if<wp::CreateAdapter>(&request.body)) {
      if (adapters_.contains(create->adapter)) {
        return fail(lane, request.id, "adapter " + create->adapter + " exists already");
      }
      State state{Adapter::fresh(create->lora.seed), request.id};
      if (!create->load_dir.empty() && !read_toy(create->load_dir, state.adapter)) {
        return fail(lane, request.id, "no files in " + create->load_dir);
      }
      adapters_[create->adapter] = state;
      return done(lane, request.id, wp::Ack{});
    }
    std::visit(
        [&](const auto& body) {
          if constexpr (requires { body.adapter; }) {
            const auto found = adapters_.find(body.adapter);
            if (found == adapters_.end()) return fail(lane, request.id, "unknown adapter " + body.adapter);
            found->second.last_request = request.id;
            apply(request.id, body, found->second.adapter);
          }
        },
        request.body);
  }
  template <typename Body>
  void apply(wp::RequestId id, const Body& body, Adapter& adapter) {
    const wp::Lane lane = wp::Lane::training;
    if constexpr (std::is_same_v<Body, wp::OptimStep>) {
      wp::OptimResult result;
      result.metrics["before:last"] = visible(adapter.chain);
      adapter.step(body.adam.learning_rate);
      result.metrics["after:last"] = visible(adapter.chain);
      result.metrics["w:last"] = visible(adapter.w);
      result.metrics["steps:last"] = static_cast<double>(adapter.steps);
      result.compute_seconds = compute_;
      done(lane, id, result);
    } else if constexpr (std::is_same_v<Body, wp::SaveAdapter>) {
      write_toy(body.dir, adapter);
      done(lane, id, wp::SaveResult{10});
    } else if constexpr (std::is_same_v<Body, wp::LoadAdapter>) {
      if (!read_toy(body.dir, adapter)) return fail(lane, id, "no files in " + body.dir);
      done(lane, id, wp::Ack{});
    } else if constexpr (std::is_same_v<Body, wp::PublishVersion>) {
      versions_[body.version] = adapter.w;
      behind_.emplace_back(body.version, body.dir);
      done(lane, id, wp::Ack{});
    } else if constexpr (std::is_same_v<Body, wp::DropAdapter>) {
      adapters_.erase(body.adapter);
      done(lane, id, wp::Ack{});
    } else {
      fail(lane, id, "refused");
    }
  }

  Queued* head(wp::RequestId id) {
    for (auto& [adapter, queue] : queues_) {
      if (!queue.empty() && queue.front().request.id == id) return &queue.front();
    }
    return nullptr;
  }

  void micro_batch() {
    wp::MicroBatch batch;
    if (!replay_.empty()) {
      for (const auto& slice : replay_.front().slices) {
        const Queued* queued = head(slice.request);
        if (queued == nullptr || queued->next_datum != slice.datum_begin) return;  // not here yet
      }
      batch = replay_.front();
      replay_.pop_front();
    } else {
      for (auto& [adapter, queue] : queues_) {
        if (queue.empty() || !is_batch(queue.front().request)) continue;
        const Queued& queued = queue.front();
        const int datums = std::get<wp::ForwardBackward>(queued.request.body).batch.num_datums();
        batch.slices.push_back({queued.request.id, queued.next_datum, std::min(datums, queued.next_datum + 2)});
      }
      if (batch.slices.empty()) return;
    }
    batch.number = ++micro_batches_;
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us_));
    std::uint64_t composition = 0;
    for (const auto& slice : batch.slices) {
      composition = mix(mix(composition, slice.request), static_cast<std::uint64_t>(slice.datum_begin) * 1000 +
                                                             static_cast<std::uint64_t>(slice.datum_end));
    }
    for (const auto& slice : batch.slices) execute(*head(slice.request), slice, composition);
    reply(wp::Lane::training, {0, wp::MicroBatchExecuted{batch}});
    for (const auto& slice : batch.slices) answer(slice.request);
  }

  void execute(Queued& queued, const wp::MicroBatchSlice& slice, std::uint64_t composition) {
    const auto& body = std::get<wp::ForwardBackward>(queued.request.body);
    State& state = adapters_.at(body.adapter);
    if (slice.datum_begin == 0) queued.result.metrics["before:last"] = visible(state.adapter.chain);
    for (int i = slice.datum_begin; i < slice.datum_end; ++i) {
      const auto begin = static_cast<std::size_t>(body.batch.cu_seqlens[static_cast<std::size_t>(i)]);
      const auto end = static_cast<std::size_t>(body.batch.cu_seqlens[static_cast<std::size_t>(i) + 1]);
      const std::span tokens(body.batch.tokens.data() + begin, end - begin);
      if (tokens[0] == kDeadly) std::abort();
      if (!body.forward_only) state.adapter.backward(tokens);
    }
    if (!body.forward_only) state.adapter.chain = mix(state.adapter.chain, composition);
    queued.next_datum = slice.datum_end;
    queued.result.metrics["after:last"] = visible(state.adapter.chain);
    queued.result.compute_seconds += compute_;
  }

  void answer(wp::RequestId id) {
    Queued& queued = *head(id);
    const auto& body = std::get<wp::ForwardBackward>(queued.request.body);
    if (queued.next_datum < body.batch.num_datums()) return;
    State& state = adapters_.at(body.adapter);
    state.last_request = id;
    queued.result.metrics["g:last"] = visible(state.adapter.g);
    done(wp::Lane::training, id, queued.result);
    queues_[body.adapter].pop_front();
    --pending_;
  }

  void sample(const wp::Request& request) {
    const wp::Lane lane = wp::Lane::sampling;
    const auto& body = std::get<wp::Sample>(request.body);
    if (cancelled_.contains(request.id)) return fail(lane, request.id, "cancelled");
    if (body.prompt[0] == kDeadly) std::abort();
    if (body.prompt[0] == kRefused) return fail(lane, request.id, "refused");
    std::uint64_t weights = 0;
    if (const auto found = versions_.find(body.version); found != versions_.end()) {
      weights = found->second;
    } else if (!body.version.empty()) {
      Adapter loaded;
      if (!read_toy(body.version_dir, loaded)) return fail(lane, request.id, "unknown version " + body.version);
      weights = loaded.w;
    }
    wp::SampleResult result;
    for (int i = 0; i < body.num_samples; ++i) {
      wp::SampledSequence sequence;
      for (int t = 0; t < std::max(body.params.max_tokens, 1); ++t) {
        sequence.tokens.push_back(sampled(weights, body.params.seed + static_cast<std::uint64_t>(i), t));
        sequence.logprobs.push_back(0);
      }
      result.sequences.push_back(std::move(sequence));
    }
    done(lane, request.id, result);
  }

  void snapshot() {
    if (snapshots_.empty()) return;
    for (const auto& [adapter, queue] : queues_) {
      if (!queue.empty() && queue.front().next_datum > 0) return;  // partly executed
    }
    const wp::Request request = std::move(snapshots_.front());
    snapshots_.pop_front();
    const std::string dir = std::get<wp::Snapshot>(request.body).dir;
    wp::SnapshotResult result;
    std::ofstream out(dir + "/toy");
    for (const auto& [name, state] : adapters_) {
      out << "adapter " << name << ' ' << state.adapter.w << ' ' << state.adapter.g << ' ' << state.adapter.steps << ' '
          << state.adapter.chain << ' ' << state.last_request << '\n';
      result.last_request[name] = state.last_request;
    }
    // A version whose files are not complete is lost with the worker.
    for (const auto& name : on_disk_) out << "version " << name << ' ' << versions_[name] << " 0 0 0 0\n";
    out << "end\n";
    result.versions_on_disk.assign(on_disk_.begin(), on_disk_.end());
    done(wp::Lane::control, request.id, result);
  }

  std::array<int, 3> fds_;
  std::array<wp::FrameReader, 3> readers_;
  std::map<std::string, std::deque<Queued>> queues_;
  std::map<std::string, State> adapters_;
  std::map<std::string, std::uint64_t> versions_;
  std::set<std::string> on_disk_;
  std::deque<std::pair<std::string, std::string>> behind_;
  std::deque<wp::Request> samples_, snapshots_;
  std::set<wp::RequestId> cancelled_;
  std::deque<wp::MicroBatch> replay_;
  std::size_t pending_ = 0, turns_ = 0;
  std::uint64_t micro_batches_ = 0;
  int delay_us_ = 0;
  double compute_ = 0.01;
};

}  // namespace
}  // namespace ht::futures::toy

int main(int argc, char** argv) {
  std::array<int, 3> fds{-1, -1, -1};
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--control-fd") fds[0] = std::atoi(argv[i + 1]);
    if (name == "--training-fd") fds[1] = std::atoi(argv[i + 1]);
    if (name == "--sampling-fd") fds[2] = std::atoi(argv[i + 1]);
  }
  return ht::futures::toy::Worker(fds).run();
}
