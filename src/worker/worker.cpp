#include "worker/worker.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <thread>

#include "base/error.h"
#include "worker/backend_config.h"
#include "worker/log.h"
#include "worker/replies.h"

namespace ht::worker {

namespace wp = worker_protocol;
using scheduler::Turn;
using std::chrono::steady_clock;

namespace {

// Cancels that overtook their sample on the other stream, or came after its end.
constexpr std::size_t kEarlyCancels = 4096;

double seconds_since(steady_clock::time_point start) {
  return std::chrono::duration<double>(steady_clock::now() - start).count();
}

std::uint64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::uint64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

// A stream that breaks in the middle is as bad as one that closes: what comes next is unknown.
Lane::Callbacks lane_callbacks(Mailbox& mailbox, const char* name) {
  return {[&mailbox](wp::Request request) { mailbox.put(std::move(request)); },
          [name](const std::string& error) {
            if (error.empty()) return;  // the control stream's end ends the process
            log_error("the " + std::string(name) + " stream is broken: " + error);
            ::_exit(1);
          }};
}

}  // namespace

Worker::Worker(int control_fd, int training_fd, int sampling_fd)
    : training_(training_fd, lane_callbacks(mailbox_, "training")),
      sampling_(sampling_fd, lane_callbacks(mailbox_, "sampling")),
      control_(control_fd, {[this](wp::Request request) { on_control(std::move(request)); },
                            [](const std::string& error) {
                              if (!error.empty()) log_error("the control stream is broken: " + error);
                              // At once: the compute thread may be busy for seconds, and nobody waits for its work.
                              ::_exit(error.empty() ? 0 : 1);
                            }}) {}

void Worker::on_control(wp::Request request) {
  if (const auto* cancel = std::get_if<wp::Cancel>(&request.body)) {
    mailbox_.cancel(cancel->target);
    control_.send({request.id, wp::Done{wp::Ack{}}});
  } else if (std::holds_alternative<wp::Status>(request.body)) {
    control_.send({request.id, wp::Done{status()}});
  } else if (std::holds_alternative<wp::Shutdown>(request.body)) {
    control_.send({request.id, wp::Done{wp::Ack{}}});
    control_.flush();
    ::_exit(0);
  } else {
    mailbox_.put(std::move(request));
  }
}

wp::StatusResult Worker::status() const {
  wp::StatusResult result;
  result.queued_training = counters_.queued_training;
  result.running_sequences = counters_.running;
  result.waiting_sequences = counters_.waiting;
  result.cache_blocks_total = counters_.blocks_total;
  result.cache_blocks_free = counters_.blocks_free;
  result.micro_batches = counters_.micro_batches;
  result.decode_steps = counters_.steps;
  result.rss_bytes = resident_bytes();
  return result;
}

void Worker::publish_counters() {
  counters_.queued_training = static_cast<std::int32_t>(trainer_->queued());
  counters_.micro_batches = trainer_->micro_batches();
  counters_.steps = sampler_->steps();
  counters_.running = sampler_->queue().num_running();
  counters_.waiting = sampler_->queue().num_waiting();
  counters_.blocks_total = sampler_->queue().num_blocks();
  counters_.blocks_free = sampler_->queue().num_free_blocks();
}

void Worker::receive(bool wait) {
  Mailbox::Mail mail = mailbox_.take(wait);
  for (wp::Request& request : mail.control) handle_control(std::move(request));
  if (!model_) {
    std::move(mail.training.begin(), mail.training.end(), std::back_inserter(early_.training));
    std::move(mail.sampling.begin(), mail.sampling.end(), std::back_inserter(early_.sampling));
    std::move(mail.cancels.begin(), mail.cancels.end(), std::back_inserter(early_.cancels));
    return;
  }
  for (wp::Request& request : std::exchange(early_.training, {})) trainer_->push(std::move(request));
  receive_samples(std::exchange(early_, {}));
  for (wp::Request& request : mail.training) trainer_->push(std::move(request));
  receive_samples(std::move(mail));
}

void Worker::receive_samples(Mailbox::Mail mail) {
  for (wp::Request& request : mail.sampling) {
    const wp::RequestId id = request.id;
    sampler_->push(std::move(request));
    if (const auto found = std::find(early_cancels_.begin(), early_cancels_.end(), id); found != early_cancels_.end()) {
      early_cancels_.erase(found);
      sampler_->cancel(id);
    }
  }
  for (const wp::RequestId target : mail.cancels) {
    if (sampler_->cancel(target)) continue;
    early_cancels_.push_back(target);
    if (early_cancels_.size() > kEarlyCancels) early_cancels_.pop_front();
  }
}

void Worker::handle_control(wp::Request request) {
  try {
    if (const auto* init = std::get_if<wp::Initialize>(&request.body)) {
      control_.send({request.id, wp::Done{initialize(request.id, *init)}});
      return;
    }
    if (const auto* table = std::get_if<wp::SetTokenTable>(&request.body)) {
      set_token_table(table->path);
    } else if (!model_) {
      throw server_error("the worker has no model yet: Initialize comes first");
    } else if (std::holds_alternative<wp::Snapshot>(request.body)) {
      snapshots_.push_back(std::move(request));
      trainer_->set_draining(true);
      return;
    } else if (const auto* restore = std::get_if<wp::Restore>(&request.body)) {
      trainer_->restore(restore->dir);
    }
    control_.send({request.id, wp::Done{wp::Ack{}}});
  } catch (const std::exception& error) {
    control_.send({request.id, failure_of(error)});
  }
}

// A table that cannot be read is none: nobody shall wait for it.
void Worker::set_token_table(const std::string& path) {
  token_table_ = nullptr;
  const auto tell_sampler = [this] {
    if (sampler_) sampler_->set_token_table(*token_table_);
  };
  try {
    if (!path.empty()) token_table_ = std::make_shared<const TokenTable>(TokenTable::read(path));
  } catch (...) {
    tell_sampler();
    throw;
  }
  tell_sampler();
}

wp::WorkerInfo Worker::initialize(wp::RequestId id, const wp::Initialize& request) {
  if (model_) throw server_error("the worker has a model already");
  const BackendConfig config = parse_backend_config(request.backend_config);
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  if (request.threads < 0 || request.threads > 4096) {
    throw user_error("threads is " + std::to_string(request.threads) + ", allowed are 0 (all cores) to 4096");
  }
  engine::EngineOptions options;
  options.threads = request.threads > 0 ? request.threads : cores;
  options.recompute = config.recompute;
  at::set_num_threads(options.threads);
  auto model = engine::BaseModel::load(request.model_dir, options, [&](double fraction, const std::string& text) {
    control_.send({id, wp::Progress{fraction, text}});
  });
  const model_spec::ModelSpec& spec = model->spec();
  if (request.max_seq_len < 0 || request.max_seq_len > spec.max_position_embeddings) {
    throw user_error("max_seq_len is " + std::to_string(request.max_seq_len) + ", the model allows 1 to " +
                     std::to_string(spec.max_position_embeddings));
  }
  wp::WorkerInfo info;
  info.max_seq_len = request.max_seq_len > 0 ? request.max_seq_len : spec.max_position_embeddings;
  const model_spec::MemoryPlan plan =
      plan_memory(spec, config, info.max_seq_len, model->has_16_bit_copy(), available_memory());
  info.memory_plan = plan.to_text();
  info.memory_plan.pop_back();  // the last line's end
  info.device = "cpu, " + std::to_string(options.threads) + " threads";

  std::string name = std::filesystem::path(request.model_dir).lexically_normal().string();
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  auto versions = std::make_unique<Versions>(spec, name, plan.demand.version_bytes);
  auto trainer = std::make_unique<TrainExecutor>(*model, *versions,
                                                 TrainOptions{config.micro_batch_tokens, info.max_seq_len, name},
                                                 [this](const wp::Reply& reply) { training_.send(reply); });
  SampleOptions sampling;
  sampling.limits = {static_cast<std::int32_t>(plan.demand.cache_tokens / kBlockSize), kBlockSize,
                     config.max_sampling_sequences, config.prefill_chunk_tokens};
  sampling.max_seq_len = info.max_seq_len;
  auto sampler = std::make_unique<SampleExecutor>(*model, *versions, sampling,
                                                  [this](const wp::Reply& reply) { sampling_.send(reply); });
  if (token_table_) sampler->set_token_table(*token_table_);
  turns_.emplace(config.sampling_share);
  model_ = std::move(model);
  versions_ = std::move(versions);
  trainer_ = std::move(trainer);
  sampler_ = std::move(sampler);
  publish_counters();
  return info;
}

void Worker::snapshot_if_drained() {
  if (snapshots_.empty() || !trainer_->drained()) return;
  for (const wp::Request& request : std::exchange(snapshots_, {})) {
    try {
      // Its results are on their way before the cut is reported.
      training_.flush();
      control_.send({request.id, wp::Done{trainer_->snapshot(std::get<wp::Snapshot>(request.body).dir)}});
    } catch (const std::exception& error) {
      control_.send({request.id, failure_of(error)});
    }
  }
  trainer_->set_draining(false);
}

double Worker::sample_slice() {
  const auto start = steady_clock::now();
  sampler_->run_slice();
  const double seconds = seconds_since(start);
  turns_->spent(Turn::sample, seconds);
  publish_counters();
  return seconds;
}

void Worker::train_slice() {
  const auto start = last_inside_ = steady_clock::now();
  inside_seconds_ = 0;
  trainer_->run_slice([this] { between_blocks(); });
  turns_->spent(Turn::train, seconds_since(start) - inside_seconds_);
}

// A long micro-batch lets samples through at the rate of their share.
void Worker::between_blocks() {
  const double due = turns_->sampling_due_inside(seconds_since(last_inside_));
  if (due == 0) return;
  receive_samples(mailbox_.take_sampling());
  double taken = 0;
  while (taken < due && sampler_->ready()) taken += sample_slice();
  inside_seconds_ += taken;
  last_inside_ = steady_clock::now();
}

void Worker::run() {
  const c10::InferenceMode no_autograd;
  bool idle = true;
  while (true) {
    receive(idle);
    if (!model_) continue;
    snapshot_if_drained();
    const Turn turn = turns_->choose(trainer_->ready(), sampler_->ready());
    if (turn == Turn::train) train_slice();
    if (turn == Turn::sample) sample_slice();
    idle = turn == Turn::none;
    publish_counters();
  }
}

}  // namespace ht::worker
