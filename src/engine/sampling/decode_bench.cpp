// Decoding speed: prefills PROMPT random tokens in each of BATCH sequences, then times STEPS decode steps.
// Prints one line: tokens/s over the steps, milliseconds a step (median), processor milliseconds a step (all threads;
// it tells most where other programs share the cores), milliseconds of the prefill.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <string>
#include <vector>

#include "engine/runtime/adapter.h"
#include "engine/runtime/base_model.h"
#include "engine/sampling/step.h"

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) {
    std::fprintf(stderr, "usage: ht_bench_decode MODEL_DIR THREADS BATCH PROMPT STEPS RANK (0: base model)\n");
    return 2;
  }
  const int batch = std::atoi(argv[3]), prompt = std::atoi(argv[4]), steps = std::atoi(argv[5]);
  const int rank = std::atoi(argv[6]);
  ht::engine::EngineOptions options;
  options.threads = std::atoi(argv[2]);
  const auto model = ht::engine::BaseModel::load(argv[1], options);
  constexpr int kBlock = 16;
  const int blocks = (prompt + steps + kBlock) / kBlock;
  ht::engine::SamplingEngine engine(*model, batch * blocks, kBlock);
  ht::engine::AdapterWeights adapter;
  if (rank > 0) {
    ht::model_spec::LoraConfig lora;
    lora.rank = rank;
    adapter = freeze(ht::engine::Adapter::create(model->spec(), lora));
  }

  std::mt19937 random(1);
  ht::worker_protocol::SamplingParams params;
  std::vector<std::vector<std::int32_t>> tokens(static_cast<std::size_t>(batch)), tables(tokens.size());
  std::vector<ht::engine::Draw> draws(tokens.size());
  std::vector<ht::engine::StepRow> rows(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    for (int j = 0; j < prompt; ++j) {
      tokens[i].push_back(static_cast<std::int32_t>(random() % static_cast<unsigned>(model->spec().vocab_size)));
    }
    for (int j = 0; j < blocks; ++j) tables[i].push_back(static_cast<std::int32_t>(i) * blocks + j);
    draws[i].seed = i;
    rows[i].adapter = rank > 0 ? &adapter : nullptr;
    rows[i].tokens = tokens[i];
    rows[i].block_table = tables[i];
    rows[i].params = &params;
    rows[i].draws = {&draws[i], 1};
  }
  engine.run(rows);  // warm-up
  const double begin = now();
  auto results = engine.run(rows);
  const double prefill = now() - begin;
  std::vector<double> times;
  const std::clock_t cpu_begin = std::clock();
  for (int step = 0; step < steps; ++step) {
    const double start = now();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      tokens[i].assign(1, results[i].draws[0].token);
      rows[i].tokens = tokens[i];
      rows[i].position = prompt + step;
    }
    results = engine.run(rows);
    times.push_back(now() - start);
  }
  const double cpu = static_cast<double>(std::clock() - cpu_begin) / CLOCKS_PER_SEC;
  double total = 0;
  for (const double time : times) total += time;
  std::nth_element(times.begin(), times.begin() + steps / 2, times.end());
  std::printf("batch %d rank %d: %.1f tok/s, %.2f ms/step (cpu %.2f), prefill %.1f ms\n", batch, rank,
              batch * steps / total, times[static_cast<std::size_t>(steps / 2)] * 1e3, cpu / steps * 1e3,
              prefill * 1e3);
}
