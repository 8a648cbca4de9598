#include "engine/training/trainer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <string>

#include "base/error.h"
#include "engine/runtime/base_model_impl.h"
#include "engine/runtime/block_loop.h"
#include "engine/runtime/forward.h"
#include "engine/training/losses.h"
#include "engine/training/optimizer.h"
#include "engine/training/packed_batch.h"

namespace ht::engine {

using worker_protocol::LossKind;
using worker_protocol::TrainBatch;

namespace {

std::span<const float> slice(const std::vector<float>& values, std::int64_t begin, std::int64_t count) {
  if (values.empty()) return {};
  return std::span<const float>(values).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count));
}

// Loss of the packed targets [begin, end), which lie in one item.
double item_loss(const MicroBatchItem& item, const PackedBatch::ItemRange& range, std::int64_t begin, std::int64_t end,
                 const float* logprobs, float* dlogprobs) {
  const TrainBatch& batch = *item.batch;
  const std::int64_t source = range.source_target_begin + (begin - range.target_begin), count = end - begin;
  LossInputs inputs;
  inputs.logprobs = {logprobs + begin, static_cast<std::size_t>(count)};
  inputs.weights = slice(batch.weights, source, count);
  inputs.old_logprobs = slice(batch.logprobs, source, count);
  inputs.advantages = slice(batch.advantages, source, count);
  inputs.sequence_ratio_mask = slice(batch.sequence_ratio_mask, source, count);
  inputs.clip_low = slice(batch.clip_low_threshold, source, count);
  inputs.clip_high = slice(batch.clip_high_threshold, source, count);
  return token_loss(item.loss, item.config, inputs, {dlogprobs + begin, static_cast<std::size_t>(count)});
}

// Whole-datum loss of every datum of an item, over packed targets. gspo needs a datum's logprobs all at once.
double datum_losses(const MicroBatchItem& item, const PackedBatch::ItemRange& range, const float* logprobs,
                    float* dlogprobs) {
  double total = 0;
  std::int64_t begin = range.target_begin;
  for (int i = item.datum_begin; i < item.datum_end; ++i) {
    const std::int64_t length = item.batch->cu_seqlens[i + 1] - item.batch->cu_seqlens[i];
    const std::int64_t end = begin + length * item.batch->target_width[i];
    total += item_loss(item, range, begin, end, logprobs, dlogprobs);
    begin = end;
  }
  return total;
}

}  // namespace

Trainer::Trainer(const BaseModel& model) : model_(model) {}

std::vector<MicroBatchItemResult> Trainer::run(std::span<const MicroBatchItem> items, bool backward,
                                               const std::function<void()>& between_blocks) {
  try {
    return run_packed(items, backward, between_blocks);
  } catch (const c10::Error& error) {
    throw server_error(std::string("the micro-batch failed: ") + error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    throw server_error("the micro-batch failed: out of memory");
  }
}

std::vector<MicroBatchItemResult> Trainer::run_packed(std::span<const MicroBatchItem> items, bool backward,
                                                      const std::function<void()>& between_blocks) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const DenseDecoder& model = model_.impl().model;
  const Recompute recompute = model_.options().recompute;
  PackedBatch packed = pack(items, model.spec.vocab_size);
  std::vector<MicroBatchItemResult> results(items.size());
  if (packed.tokens.empty()) return results;

  // Gradients go to a scratch buffer first: a failure on the way leaves the accumulated ones untouched.
  std::vector<at::Tensor> scratch;
  std::vector<AdapterView> views;
  for (Adapter* adapter : packed.adapters) {
    scratch.push_back(backward ? at::zeros_like(adapter->grad) : at::Tensor());
    views.push_back(make_adapter_view(model.device, adapter->weights, scratch.back()));
  }
  for (std::size_t i = 0; i < views.size(); ++i) packed.segments[i].adapter = &views[i];

  Tape tape;
  const PackedSequences sequences = packed.sequences();
  const RowTargets targets = packed.row_targets();
  const at::Tensor hidden =
      run_blocks(model, sequences, packed.segments, nullptr, backward ? &tape : nullptr, recompute, between_blocks);
  std::vector<float> logprobs(packed.targets.size()), dlogprobs(packed.targets.size());

  // Items whose loss needs a whole datum's logprobs get them by a first pass through the head.
  for (std::size_t i = 0; i < items.size(); ++i) {
    const PackedBatch::ItemRange& range = packed.items[i];
    if (backward && items[i].loss != LossKind::gspo) continue;
    model.head.logprobs(model.device, hidden, packed.segments, targets, range.row_begin, range.row_end, logprobs.data(),
                        between_blocks);
    results[i].loss_sum = datum_losses(items[i], range, logprobs.data(), dlogprobs.data());
  }
  if (backward) {
    const TokenLoss loss = [&](std::int64_t begin, std::int64_t end, const float* lp, float* dlp) {
      for (std::size_t i = 0; i < items.size(); ++i) {
        const PackedBatch::ItemRange& range = packed.items[i];
        const std::int64_t from = std::max(begin, range.target_begin), to = std::min(end, range.target_end);
        if (from >= to) continue;
        if (items[i].loss == LossKind::gspo) {
          std::copy(dlogprobs.begin() + from, dlogprobs.begin() + to, dlp + from);
        } else {
          results[i].loss_sum += item_loss(items[i], range, from, to, lp, dlp);
        }
      }
    };
    const at::Tensor dhidden =
        model.head.loss_backward(model.device, hidden, packed.segments, targets, loss, logprobs.data(), between_blocks);
    run_blocks_backward(model, packed.segments, tape, dhidden, recompute, between_blocks);
    for (std::size_t i = 0; i < packed.adapters.size(); ++i) packed.adapters[i]->grad.add_(scratch[i]);
  }
  for (std::size_t i = 0; i < items.size(); ++i) {
    results[i].logprobs.assign(logprobs.begin() + packed.items[i].target_begin,
                               logprobs.begin() + packed.items[i].target_end);
  }
  return results;
}

std::map<std::string, double> Trainer::optim_step(Adapter& adapter, const worker_protocol::AdamParams& params) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const double norm = global_norm(model_.device(), adapter.grad);
  if (!std::isfinite(norm)) {
    adapter.grad.zero_();
    throw user_error("the gradient is not finite (its norm is " + std::to_string(norm) +
                     "): the step was skipped, weights and moments are unchanged, the gradient is cleared");
  }
  adamw_step(model_.device(), adapter, params, norm);
  adapter.grad.zero_();
  return {{"grad_norm", norm}, {"learning_rate", params.learning_rate}, {"step", static_cast<double>(adapter.step)}};
}

}  // namespace ht::engine
