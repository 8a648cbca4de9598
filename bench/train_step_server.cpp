// The engine's side of bench/train_step.py: loads a model once, then runs one training step for each line
// "<mode> <length>,<length>,…" on standard input and answers "<seconds> <peak RSS MiB>". Modes: "packed" runs all lengths
// as one micro-batch, "single" one after the other. The rival runs its own steps between ours, so both meet the same noise.

#include <ATen/Parallel.h>
#include <sys/resource.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "engine/runtime/adapter.h"
#include "engine/runtime/base_model.h"
#include "engine/training/trainer.h"

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

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: bench_train_step MODEL_DIR RANK THREADS\n";
    return 2;
  }
  ht::engine::EngineOptions options;
  options.threads = std::atoi(argv[3]);
  at::set_num_threads(options.threads);
  auto model = ht::engine::BaseModel::load(argv[1], options);
  ht::model_spec::LoraConfig lora;
  lora.rank = std::atoi(argv[2]);
  auto adapter = ht::engine::Adapter::create(model->spec(), lora);
  ht::engine::Trainer trainer(*model);
  std::cout << "ready" << std::endl;

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
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    std::cout << seconds.count() << ' ' << usage.ru_maxrss / 1024.0 << std::endl;
  }
}
