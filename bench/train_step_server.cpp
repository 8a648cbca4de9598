// The engine's side of bench/train_step.py: loads a model once, then runs one training step for each line
// "<mode> <length>,<length>,…" on standard input and answers "<seconds> <processor seconds> <peak RSS MiB>". Modes:
// "packed" runs all lengths as one micro-batch, "single" one after the other. The rival runs its own steps between
// ours, so both meet the same noise. The "ready" line has the RSS in MiB with model and adapter loaded, the peak up to
// then, and the plan's figures for a micro-batch of TOKENS: total and activations.

#include <ATen/Parallel.h>

#include <chrono>
#include <cstdlib>
#include <ctime>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "base/process_memory.h"
#include "engine/runtime/adapter.h"
#include "engine/runtime/base_model.h"
#include "engine/training/trainer.h"
#include "model_spec/memory_plan.h"

namespace {

using ht::worker_protocol::TrainBatch;

// Random tokens with next-token targets: what is computed does not depend on the values.
TrainBatch make_batch(const std::vector<int>& lengths, int vocab_size) {
  std::mt19937 random(0);
  TrainBatch batch;
  batch.cu_seqlens.push_back(0);
  for (int length : lengths) {
    for (int i = 0; i < length; ++i) {
      batch.tokens.push_back(static_cast<std::int32_t>(random() % vocab_size));
      batch.targets.push_back(static_cast<std::int32_t>(random() % vocab_size));
      batch.weights.push_back(1.0f);
    }
    batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    batch.target_width.push_back(1);
  }
  return batch;
}

ht::engine::MicroBatchItem item_of(ht::engine::Adapter& adapter, const TrainBatch& batch, int begin, int end) {
  ht::engine::MicroBatchItem item;
  item.adapter = &adapter;
  item.batch = &batch;
  item.datum_begin = begin;
  item.datum_end = end;
  return item;
}

double mib(const char* name) {
  return static_cast<double>(ht::memory_of_process(name)) / (1 << 20);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: bench_train_step MODEL_DIR RANK THREADS none|norms_mlp|block TOKENS\n";
    return 2;
  }
  ht::engine::EngineOptions options;
  const std::string policy = argv[4];
  options.recompute = policy == "block"       ? ht::engine::Recompute::block
                      : policy == "norms_mlp" ? ht::engine::Recompute::norms_mlp
                                              : ht::engine::Recompute::none;
  options.threads = std::atoi(argv[3]);
  at::set_num_threads(options.threads);
  auto model = ht::engine::BaseModel::load(argv[1], options);
  ht::model_spec::LoraConfig lora;
  lora.rank = std::atoi(argv[2]);
  auto adapter = ht::engine::Adapter::create(model->spec(), lora);
  ht::engine::Trainer trainer(*model);
  ht::model_spec::MemoryDemand demand;
  demand.lora = lora;
  demand.micro_batch_tokens = std::atoi(argv[5]);
  demand.recompute = options.recompute;
  demand.copy_16_bits = model->has_16_bit_copy();
  const auto plan = ht::model_spec::plan_memory(model->spec(), demand);
  constexpr double kMiB = 1 << 20;
  std::cout << "ready " << mib("VmRSS") << ' ' << mib("VmHWM") << ' ' << static_cast<double>(plan.total()) / kMiB << ' '
            << static_cast<double>(plan.activations + ht::model_spec::adapter_bytes(model->spec(), lora) / 6) /
                   kMiB  // a batch's gradient
            << std::endl;

  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string mode, list;
    words >> mode >> list;
    std::vector<int> lengths;
    std::istringstream numbers(list);
    for (std::string number; std::getline(numbers, number, ',');) lengths.push_back(std::stoi(number));
    const TrainBatch batch = make_batch(lengths, model->spec().vocab_size);

    adapter.grad.zero_();
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t processor_start = std::clock();
    if (mode == "packed") {
      const auto item = item_of(adapter, batch, 0, batch.num_datums());
      trainer.run({&item, 1}, true);
    } else {
      for (int datum = 0; datum < batch.num_datums(); ++datum) {
        const auto item = item_of(adapter, batch, datum, datum + 1);
        trainer.run({&item, 1}, true);
      }
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double processor = static_cast<double>(std::clock() - processor_start) / CLOCKS_PER_SEC;
    std::cout << seconds.count() << ' ' << processor << ' ' << mib("VmHWM") << std::endl;
  }
}
