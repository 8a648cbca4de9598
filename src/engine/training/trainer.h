#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/runtime/adapter.h"
#include "engine/runtime/base_model.h"
#include "worker_protocol/messages.h"

namespace ht::engine {

// Part of one request in a micro-batch: datums [datum_begin, datum_end) of `batch`, run with `adapter`.
struct MicroBatchItem {
  Adapter* adapter = nullptr;
  const worker_protocol::TrainBatch* batch = nullptr;
  int datum_begin = 0;
  int datum_end = 0;
  worker_protocol::LossKind loss = worker_protocol::LossKind::cross_entropy;
  worker_protocol::LossConfig config;
};

struct MicroBatchItemResult {
  std::vector<float> logprobs;  // of the item's targets, in the order of TrainBatch::targets
  double loss_sum = 0;
};

// Runs packed micro-batches and optimizer steps on the compute thread.
class Trainer {
 public:
  explicit Trainer(const BaseModel& model);

  // One packed batch over all items; items of one adapter must be adjacent. With `backward`, gradients are added to
  // each adapter's buffer. `between_blocks` is called between transformer blocks and between chunks of the head (a long
  // batch lets samples through there); it may be empty, and what it throws passes through. Throws Error(server) on a
  // failure that leaves gradients untouched.
  std::vector<MicroBatchItemResult> run(std::span<const MicroBatchItem> items, bool backward,
                                        const std::function<void()>& between_blocks = {});

  // AdamW with torch.optim.AdamW's arithmetic on the accumulated gradient, which is cleared. A non-finite gradient
  // throws Error(user) and leaves weights, moments and step as they were (the gradient is cleared). Metrics:
  // "grad_norm", "learning_rate", "step".
  std::map<std::string, double> optim_step(Adapter& adapter, const worker_protocol::AdamParams& params);

 private:
  std::vector<MicroBatchItemResult> run_packed(std::span<const MicroBatchItem> items, bool backward,
                                               const std::function<void()>& between_blocks);

  const BaseModel& model_;
};

}  // namespace ht::engine
