#include "worker/train_executor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <set>

#include "base/error.h"
#include "worker/adapter_buffers.h"
#include "worker/log.h"

namespace ht::worker {

namespace wp = worker_protocol;
using scheduler::TrainMicroBatch;
using scheduler::TrainPlan;
using scheduler::TrainSlice;
using wp::RequestId;

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::int64_t num_tokens(const wp::TrainBatch& batch, const TrainSlice& slice) {
  return batch.cu_seqlens[static_cast<std::size_t>(slice.datum_end)] -
         batch.cu_seqlens[static_cast<std::size_t>(slice.datum_begin)];
}

}  // namespace

void check_batch(const wp::TrainBatch& batch, std::int32_t vocab_size, std::int32_t max_seq_len) {
  if (batch.num_datums() < 1) throw user_error("the batch has no datum: at least 1 is needed");
  if (std::ssize(batch.target_width) != batch.num_datums()) throw server_error("target_width does not fit the datums");
  if (batch.cu_seqlens.front() != 0 || batch.cu_seqlens.back() != std::ssize(batch.tokens)) {
    throw server_error("cu_seqlens does not fit the tokens");
  }
  std::int64_t targets = 0;
  for (int i = 0; i < batch.num_datums(); ++i) {
    const auto index = static_cast<std::size_t>(i);
    const std::int32_t length = batch.cu_seqlens[index + 1] - batch.cu_seqlens[index];
    if (length < 0) throw server_error("cu_seqlens decreases at datum " + std::to_string(i));
    if (length == 0) throw user_error("datum " + std::to_string(i) + " has no tokens");
    if (length > max_seq_len) {
      throw user_error("datum " + std::to_string(i) + " has " + std::to_string(length) + " tokens, at most " +
                       std::to_string(max_seq_len) + " are allowed");
    }
    if (batch.target_width[index] < 1) throw server_error("target_width of datum " + std::to_string(i) + " is below 1");
    targets += std::int64_t{length} * batch.target_width[index];
  }
  if (targets != std::ssize(batch.targets)) {
    throw user_error("target_tokens has " + std::to_string(batch.targets.size()) + " elements, expected " +
                     std::to_string(targets));
  }
  const auto check_ids = [vocab_size](const std::vector<std::int32_t>& ids, const char* what) {
    for (const std::int32_t id : ids) {
      if (id >= 0 && id < vocab_size) continue;
      throw user_error(std::string(what) + " " + std::to_string(id) + ": the vocabulary has the ids 0 to " +
                       std::to_string(vocab_size - 1));
    }
  };
  check_ids(batch.tokens, "token");
  check_ids(batch.targets, "target token");
}

TrainExecutor::TrainExecutor(const engine::BaseModel& model, Versions& versions, FileThread& files,
                             TrainOptions options, Send send)
    : model_(model),
      versions_(versions),
      files_(files),
      options_(std::move(options)),
      send_(std::move(send)),
      trainer_(model),
      queue_(options_.micro_batch_tokens) {}

void TrainExecutor::push(wp::Request request) {
  const RequestId id = request.id;
  if (auto* batch = std::get_if<wp::ForwardBackward>(&request.body)) {
    push_batch(id, std::move(*batch));
  } else if (auto* create_adapter = std::get_if<wp::CreateAdapter>(&request.body)) {
    push_op(id, create_adapter->adapter, [this, id, body = *create_adapter] { return create(id, body); });
  } else if (auto* drop = std::get_if<wp::DropAdapter>(&request.body)) {
    push_op(id, drop->adapter, [this, name = drop->adapter]() -> wp::DoneBody {
      drop_adapter(name);
      return wp::Ack{};
    });
  } else if (auto* optim = std::get_if<wp::OptimStep>(&request.body)) {
    push_op(id, optim->adapter, [this, body = *optim] { return step(body); });
  } else if (auto* save_adapter = std::get_if<wp::SaveAdapter>(&request.body)) {
    push_op(id, save_adapter->adapter, [this, id, body = *save_adapter] {
      save(id, body);
      return std::nullopt;
    });
  } else if (auto* load_adapter = std::get_if<wp::LoadAdapter>(&request.body)) {
    push_op(id, load_adapter->adapter, [this, id, body = *load_adapter] {
      load(id, body);
      return std::nullopt;
    });
  } else if (auto* publish_version = std::get_if<wp::PublishVersion>(&request.body)) {
    push_op(id, publish_version->adapter, [this, id, body = *publish_version] { return publish(id, body, false); });
  } else if (auto* replay = std::get_if<wp::Replay>(&request.body)) {
    std::vector<TrainMicroBatch> micro_batches;
    for (const wp::MicroBatch& record : replay->micro_batches) {
      TrainMicroBatch& micro_batch = micro_batches.emplace_back();
      micro_batch.number = record.number;
      for (const auto& slice : record.slices) {
        micro_batch.slices.push_back({slice.request, slice.datum_begin, slice.datum_end});
      }
    }
    queue_.set_replay(std::move(micro_batches));
    send_({id, wp::Done{wp::Ack{}}});
  }
}

void TrainExecutor::push_op(RequestId id, const std::string& adapter, Op run) {
  ops_[id] = PendingOp{adapter, std::move(run)};
  queue_.push({id, adapter, false, false, {}});
}

void TrainExecutor::push_batch(RequestId id, wp::ForwardBackward request) {
  try {
    check_batch(request.batch, model_.spec().vocab_size, options_.max_seq_len);
  } catch (const Error& error) {
    // It fails when its turn comes: an adapter's answers keep the order of its requests.
    push_op(id, request.adapter, [error]() -> wp::DoneBody { throw error; });
    return;
  }
  scheduler::TrainRequest queued{id, request.adapter, true, request.forward_only, {}};
  Batch batch;
  batch.target_offsets.push_back(0);
  for (int i = 0; i < request.batch.num_datums(); ++i) {
    const auto tokens = static_cast<std::int32_t>(num_tokens(request.batch, {id, i, i + 1}));
    queued.datum_tokens.push_back(tokens);
    batch.target_offsets.push_back(
        batch.target_offsets.back() +
        static_cast<std::size_t>(tokens) *
            static_cast<std::size_t>(request.batch.target_width[static_cast<std::size_t>(i)]));
  }
  batch.logprobs.resize(batch.target_offsets.back());
  batch.datums_left = request.batch.num_datums();
  batch.request = std::move(request);
  batches_[id] = std::move(batch);
  queue_.push(std::move(queued));
}

bool TrainExecutor::ready() {
  try {
    return queue_.ready();
  } catch (const Error& error) {
    log_error(std::string(error.what()) + "; the rest is composed anew");
    queue_.clear_replay();
    return queue_.ready();
  }
}

void TrainExecutor::run_slice(const std::function<void()>& between_blocks) {
  if (!ready()) return;
  const TrainPlan plan = queue_.next();
  switch (plan.kind) {
    case TrainPlan::Kind::none:
      break;
    case TrainPlan::Kind::op:
      run_op(plan.request);
      break;
    case TrainPlan::Kind::refused: {
      const std::string name = batches_.at(plan.request).request.adapter;
      batches_.erase(plan.request);
      fail(plan.request, name, user_error("no adapter " + name + " in this worker"));
      break;
    }
    case TrainPlan::Kind::micro_batch:
      run_micro_batch(plan.micro_batch, between_blocks);
      break;
  }
}

void TrainExecutor::run_op(RequestId id) {
  const PendingOp op = std::move(ops_.at(id));
  ops_.erase(id);
  try {
    if (auto body = op.run()) done(id, op.adapter, std::move(*body));
  } catch (const std::exception& error) {
    fail(id, op.adapter, error);
  }
}

void TrainExecutor::run_micro_batch(const TrainMicroBatch& micro_batch, const std::function<void()>& between_blocks) {
  try {
    execute(micro_batch, between_blocks);
    return;
  } catch (const std::exception& error) {
    std::set<RequestId> requests;
    for (const TrainSlice& slice : micro_batch.slices) requests.insert(slice.request);
    if (requests.size() == 1) {
      const RequestId id = *requests.begin();
      const std::string name = batches_.at(id).request.adapter;
      queue_.remove(id);
      batches_.erase(id);
      fail(id, name, error);
      return;
    }
    log_warning("micro-batch " + std::to_string(micro_batch.number) +
                " failed, its requests run one by one: " + error.what());
  }
  // Gradients are as they were before. One request's trouble must not be the others'.
  for (std::size_t i = 0; i < micro_batch.slices.size(); ++i) {
    TrainMicroBatch alone{
        i == 0 ? micro_batch.number : queue_.next_number(), micro_batch.forward_only, {micro_batch.slices[i]}};
    queue_.set_next_number(std::max(queue_.next_number(), alone.number + 1));
    run_micro_batch(alone, between_blocks);
  }
}

// What the slice's gradient is added to.
engine::Adapter& TrainExecutor::accumulator(Batch& batch, const TrainSlice& slice) {
  engine::Adapter& whole = adapters_.at(batch.request.adapter);
  const bool one_micro_batch = slice.datum_begin == 0 && slice.datum_end == batch.request.batch.num_datums();
  if (batch.request.forward_only) return whole;
  if (one_micro_batch) {
    own(whole.grad);
    return whole;
  }
  if (!batch.partial) batch.partial = engine::Adapter{whole.weights, at::zeros_like(whole.grad), {}, {}, 0};
  return *batch.partial;
}

void TrainExecutor::execute(const TrainMicroBatch& micro_batch, const std::function<void()>& between_blocks) {
  std::vector<engine::MicroBatchItem> items;
  std::int64_t tokens = 0;
  for (const TrainSlice& slice : micro_batch.slices) {
    Batch& batch = batches_.at(slice.request);
    const wp::ForwardBackward& request = batch.request;
    items.push_back(
        {&accumulator(batch, slice), &request.batch, slice.datum_begin, slice.datum_end, request.loss, request.config});
    tokens += num_tokens(request.batch, slice);
  }
  double inside = 0;
  const auto let_through = [&] {
    const auto start = std::chrono::steady_clock::now();
    between_blocks();
    inside += seconds_since(start);
  };
  const auto start = std::chrono::steady_clock::now();
  const auto results = trainer_.run(items, !micro_batch.forward_only, let_through);
  const double seconds = seconds_since(start) - inside;
  ++micro_batches_;
  tokens_ += static_cast<std::uint64_t>(tokens);

  wp::MicroBatch record{micro_batch.number, {}};
  for (const TrainSlice& slice : micro_batch.slices) {
    record.slices.push_back({slice.request, slice.datum_begin, slice.datum_end});
  }
  send_({0, wp::MicroBatchExecuted{std::move(record)}});
  std::vector<RequestId> finished;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const TrainSlice& slice = micro_batch.slices[i];
    Batch& batch = batches_.at(slice.request);
    std::copy(results[i].logprobs.begin(), results[i].logprobs.end(),
              batch.logprobs.begin() +
                  static_cast<std::ptrdiff_t>(batch.target_offsets[static_cast<std::size_t>(slice.datum_begin)]));
    batch.loss += results[i].loss_sum;
    batch.seconds +=
        seconds * static_cast<double>(num_tokens(batch.request.batch, slice)) / static_cast<double>(tokens);
    batch.datums_left -= slice.datum_end - slice.datum_begin;
    if (batch.datums_left == 0) finished.push_back(slice.request);
  }
  for (const RequestId id : finished) finish_batch(id);
}

void TrainExecutor::finish_batch(RequestId id) {
  Batch batch = std::move(batches_.at(id));
  batches_.erase(id);
  if (batch.partial) {
    at::Tensor& grad = adapters_.at(batch.request.adapter).grad;
    own(grad);
    grad.add_(batch.partial->grad);
  }
  wp::TrainResult result;
  result.logprobs = std::move(batch.logprobs);
  const auto tokens = static_cast<double>(batch.request.batch.tokens.size());
  result.metrics["loss:sum"] = batch.loss;
  result.metrics["num_tokens:sum"] = tokens;
  result.metrics["compute_seconds:sum"] = batch.seconds;
  result.metrics["tokens_per_second:mean"] = batch.seconds > 0 ? tokens / batch.seconds : 0.0;
  result.compute_seconds = batch.seconds;
  done(id, batch.request.adapter, std::move(result));
}

void TrainExecutor::done(RequestId id, const std::string& adapter, wp::DoneBody body) {
  if (adapters_.contains(adapter)) {
    last_request_[adapter] = id;
  } else {
    last_request_.erase(adapter);
  }
  send_({id, wp::Done{std::move(body)}});
}

void TrainExecutor::fail(RequestId id, const std::string& adapter, const std::exception& error) {
  if (adapters_.contains(adapter)) last_request_[adapter] = id;
  send_({id, failure_of(error)});
}

}  // namespace ht::worker
