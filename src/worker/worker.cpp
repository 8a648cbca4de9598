#include "worker/worker.h"

#include <ATen/ATen.h>
#include <unistd.h>

#include <algorithm>

#include "base/error.h"
#include "base/process_memory.h"
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
    : files_([this](FileThread::Then then) { mailbox_.post(std::move(then)); }),
      training_(training_fd, lane_callbacks(mailbox_, "training")),
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
  result.rss_bytes = memory_of_process("VmRSS");
  result.peak_rss_bytes = memory_of_process("VmHWM");
  result.trained_tokens = counters_.trained_tokens;
  result.sampled_tokens = counters_.sampled_tokens;
  result.preemptions = counters_.preemptions;
  result.adapter_bytes = counters_.adapter_bytes;
  result.adapter_bytes_limit = counters_.adapter_bytes_limit;
  result.version_bytes = counters_.version_bytes;
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
  counters_.trained_tokens = trainer_->tokens();
  counters_.sampled_tokens = sampler_->tokens();
  counters_.preemptions = sampler_->queue().num_preemptions();
  counters_.adapter_bytes = trainer_->adapter_bytes();
  counters_.version_bytes = versions_->bytes_in_memory();
}

void Worker::receive(bool wait) {
  Mailbox::Mail mail = mailbox_.take(wait);
  for (const FileThread::Then& then : mail.files) then();
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

void Worker::snapshot_if_drained() {
  if (snapshots_.empty() || !trainer_->drained()) return;
  for (const wp::Request& request : std::exchange(snapshots_, {})) {
    trainer_->snapshot(std::get<wp::Snapshot>(request.body).dir,
                       [this, id = request.id](const TrainExecutor::SnapshotReply& reply) {
                         std::visit([&](const auto& body) { control_.send({id, body}); }, reply);
                       });
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
  Mailbox::Mail mail = mailbox_.take_sampling();
  // What comes of files changes no adapter of this micro-batch: while an adapter's files are read, nothing of it runs.
  for (const FileThread::Then& then : mail.files) then();
  receive_samples(std::move(mail));
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
