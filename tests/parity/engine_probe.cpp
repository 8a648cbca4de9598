// Runs the training engine on a JSON description and writes what it computed, for comparison with PyTorch.
//
//   engine_probe MODEL_DIR JOB.json OUT_DIR
//
// JOB: {"threads": 2, "recompute": "none" | "norms_mlp" | "block",
//       "device": "cpu" | "reference bfloat16" (the CPU in bfloat16, on the plain reference kernels) | "cuda",
//       "adapters": [{"dir": "…"} | {"rank": 8, "seed": 1, "train_attn": true, …}],
//       "steps": [{"calls": [{"backward": true, "items": [{"adapter": 0, "loss": "cross_entropy", "config": {},
//                    "datums": [{"tokens": [], "targets": [] or [[]], "weights": [], "logprobs": [], …}]}]}],
//                  "gradients": "dir"?,   // replaces adapter 0's gradient
//                  "adam": {…}?}],
//       "generate": [{"adapter": 0?, "prompt": [], "max_tokens": 8}]}   // greedy, after the steps, with the sampler
// OUT: results.safetensors ("step0.call0.item0.logprobs", "generate0.logprobs"), results.json (loss sums, metrics and
//      generated tokens, in order, and the peak of resident memory),
//      grad<i>/ after the last step's calls and weights<i>/, state<i>.safetensors at the end.

#include <ATen/ATen.h>

#include <boost/json.hpp>
#include <chrono>
#include <cstdio>
#include <deque>
#include <exception>
#include <fstream>
#include <numeric>
#include <sstream>

#include "base/error.h"
#include "base/process_memory.h"
#include "engine/device/cpu.h"
#include "engine/device/cuda_library.h"
#include "engine/sampling/step.h"
#include "engine/training/trainer.h"
#include "safetensors/safetensors.h"

namespace json = boost::json;
using namespace ht;
using namespace ht::engine;

namespace {

std::vector<float> floats(const json::object& object, const char* key) {
  std::vector<float> values;
  const json::value* array = object.if_contains(key);
  if (array == nullptr) return values;
  for (const json::value& v : array->as_array()) {
    if (!v.is_array()) {
      values.push_back(v.to_number<float>());
      continue;
    }
    for (const json::value& inner : v.as_array()) values.push_back(inner.to_number<float>());
  }
  return values;
}

void append(std::vector<float>& to, const std::vector<float>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

worker_protocol::TrainBatch read_batch(const json::array& datums) {
  worker_protocol::TrainBatch batch;
  batch.cu_seqlens.push_back(0);
  for (const json::value& value : datums) {
    const json::object& datum = value.as_object();
    for (const json::value& token : datum.at("tokens").as_array()) {
      batch.tokens.push_back(token.to_number<std::int32_t>());
    }
    batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    const json::array& targets = datum.at("targets").as_array();
    batch.target_width.push_back(targets.front().is_array() ? static_cast<int>(targets.front().as_array().size()) : 1);
    for (const json::value& target : targets) {
      if (!target.is_array()) {
        batch.targets.push_back(target.to_number<std::int32_t>());
        continue;
      }
      for (const json::value& inner : target.as_array()) batch.targets.push_back(inner.to_number<std::int32_t>());
    }
    append(batch.weights, floats(datum, "weights"));
    append(batch.logprobs, floats(datum, "logprobs"));
    append(batch.advantages, floats(datum, "advantages"));
    append(batch.sequence_ratio_mask, floats(datum, "sequence_ratio_mask"));
    append(batch.clip_low_threshold, floats(datum, "clip_low_threshold"));
    append(batch.clip_high_threshold, floats(datum, "clip_high_threshold"));
  }
  return batch;
}

Adapter read_adapter(const BaseModel& model, const json::object& object) {
  const model_spec::ModelSpec& spec = model.spec();
  if (const json::value* dir = object.if_contains("dir")) {
    Adapter adapter = Adapter::create(spec, read_lora_config(dir->as_string().c_str()), model.device());
    adapter.weights.flat.copy_(load_adapter_weights(spec, dir->as_string().c_str()).flat);
    return adapter;
  }
  const auto flag = [&](const char* key) { return !object.contains(key) || object.at(key).as_bool(); };
  model_spec::LoraConfig config;
  config.rank = object.at("rank").to_number<int>();
  config.seed = object.at("seed").to_number<std::uint64_t>();
  config.train_attn = flag("train_attn");
  config.train_mlp = flag("train_mlp");
  config.train_unembed = flag("train_unembed");
  return Adapter::create(spec, config, model.device());
}

worker_protocol::AdamParams read_adam(const json::object& object) {
  worker_protocol::AdamParams adam;
  const auto set = [&](const char* key, double& field) {
    if (const json::value* v = object.if_contains(key)) field = v->to_number<double>();
  };
  set("learning_rate", adam.learning_rate);
  set("beta1", adam.beta1);
  set("beta2", adam.beta2);
  set("eps", adam.eps);
  set("weight_decay", adam.weight_decay);
  set("grad_clip_norm", adam.grad_clip_norm);
  return adam;
}

struct Probe {
  const BaseModel& model;
  std::vector<Adapter> adapters;
  std::filesystem::path out;
  std::deque<std::vector<float>> kept;  // what the tensors point at
  std::vector<safetensors::TensorToWrite> tensors;
  json::array calls, metrics, generated;

  void call(Trainer& trainer, const json::object& object, const std::string& name) {
    std::deque<worker_protocol::TrainBatch> batches;
    std::vector<MicroBatchItem> items;
    for (const json::value& value : object.at("items").as_array()) {
      const json::object& entry = value.as_object();
      batches.push_back(read_batch(entry.at("datums").as_array()));
      const worker_protocol::LossSpec* loss = worker_protocol::find_loss(std::string(entry.at("loss").as_string()));
      if (loss == nullptr) throw user_error("unknown loss");
      MicroBatchItem item;
      item.adapter = &adapters.at(static_cast<std::size_t>(entry.at("adapter").to_number<int>()));
      item.batch = &batches.back();
      item.datum_end = batches.back().num_datums();
      item.loss = loss->kind;
      item.config = loss->defaults;
      if (const json::value* config = entry.if_contains("config")) {
        for (const auto& [key, v] : config->as_object()) {
          worker_protocol::set_loss_config(*loss, item.config, std::string(key), v.to_number<double>());
        }
      }
      items.push_back(item);
    }
    const auto start = std::chrono::steady_clock::now();
    std::vector<MicroBatchItemResult> results = trainer.run(items, object.at("backward").as_bool());
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    json::array losses;
    for (std::size_t i = 0; i < results.size(); ++i) {
      losses.emplace_back(results[i].loss_sum);
      kept.push_back(std::move(results[i].logprobs));
      tensors.push_back({name + ".item" + std::to_string(i) + ".logprobs",
                         safetensors::DType::f32,
                         {static_cast<std::int64_t>(kept.back().size())},
                         kept.back().data()});
    }
    calls.push_back(json::object{{"losses", losses}, {"seconds", seconds}});
  }

  void step(Trainer& trainer, const json::object& object, const std::string& name) {
    if (const json::value* list = object.if_contains("calls")) {
      int index = 0;
      for (const json::value& value : list->as_array()) {
        call(trainer, value.as_object(), name + ".call" + std::to_string(index++));
      }
    }
    if (const json::value* dir = object.if_contains("gradients")) {
      adapters.at(0).grad.copy_(load_adapter_weights(model.spec(), dir->as_string().c_str()).flat);
    }
    save_all("grad", true);
    if (const json::value* adam = object.if_contains("adam")) {
      for (Adapter& adapter : adapters) {
        json::object entry;
        for (const auto& [key, value] : trainer.optim_step(adapter, read_adam(adam->as_object()))) entry[key] = value;
        metrics.push_back(entry);
      }
    }
  }

  // The prompt in one prefill chunk, then token by token.
  void generate(const json::object& object, const std::string& name) {
    constexpr std::int32_t kBlockSize = 16;
    std::vector<std::int32_t> tokens;
    for (const json::value& token : object.at("prompt").as_array()) tokens.push_back(token.to_number<std::int32_t>());
    const int count = object.at("max_tokens").to_number<int>();
    std::vector<std::int32_t> table((tokens.size() + static_cast<std::size_t>(count)) / kBlockSize + 1);
    std::iota(table.begin(), table.end(), 0);
    SamplingEngine engine(model, static_cast<std::int32_t>(table.size()), kBlockSize);
    worker_protocol::SamplingParams params;
    params.temperature = 0;
    const Draw draw;
    StepRow row;
    if (const json::value* adapter = object.if_contains("adapter")) {
      row.adapter = &adapters.at(static_cast<std::size_t>(adapter->to_number<int>())).weights;
    }
    row.tokens = tokens;
    row.block_table = table;
    row.params = &params;
    row.draws = {&draw, 1};
    json::array drawn;
    std::vector<float>& logprobs = kept.emplace_back();
    std::int32_t last = 0;
    for (int i = 0; i < count; ++i) {
      const StepRowResult result = engine.run({&row, 1}).front();
      if (!result.error.empty()) throw user_error(result.error);
      last = result.draws.front().token;
      drawn.emplace_back(last);
      logprobs.push_back(result.draws.front().logprob);
      row.position += static_cast<std::int32_t>(row.tokens.size());
      row.tokens = {&last, 1};
    }
    generated.push_back(std::move(drawn));
    tensors.push_back({name + ".logprobs", safetensors::DType::f32, {count}, logprobs.data()});
  }

  void save_all(const std::string& prefix, bool gradients) {
    for (std::size_t i = 0; i < adapters.size(); ++i) {
      const std::filesystem::path dir = out / (prefix + std::to_string(i));
      std::filesystem::create_directories(dir);
      AdapterWeights weights = adapters[i].weights;
      if (gradients) weights.flat = adapters[i].grad;
      save_adapter_weights(weights, "probe", dir);
      if (!gradients) save_optimizer(adapters[i], dir);
    }
  }
};

const Device& find_device(const std::string& name) {
  std::string why_not;
  if (name == "cpu") return cpu_device();
  if (name == "reference bfloat16") return reference_device(at::kBFloat16);
  const Device* device = name == "cuda" ? load_cuda_device(why_not) : nullptr;
  if (device == nullptr) throw user_error("device " + name + ": " + why_not);
  return *device;
}

int run(const char* model_dir, const char* job_file, const char* out_dir) {
  std::ifstream in(job_file);
  std::stringstream text;
  text << in.rdbuf();
  const json::object job = json::parse(text.str()).as_object();
  EngineOptions options;
  if (const json::value* threads = job.if_contains("threads")) options.threads = threads->to_number<int>();
  if (const json::value* policy = job.if_contains("recompute")) {
    const std::string name(policy->as_string());
    options.recompute = name == "block"       ? Recompute::block
                        : name == "norms_mlp" ? Recompute::norms_mlp
                                              : Recompute::none;
  }
  if (const json::value* device = job.if_contains("device"))
    options.device = &find_device(std::string(device->as_string()));
  const std::unique_ptr<BaseModel> model = BaseModel::load(model_dir, options);
  Probe probe{*model, {}, out_dir, {}, {}, {}, {}, {}};
  std::filesystem::create_directories(probe.out);
  for (const json::value& value : job.at("adapters").as_array()) {
    probe.adapters.push_back(read_adapter(*model, value.as_object()));
  }
  Trainer trainer(*model);
  int index = 0;
  for (const json::value& value : job.at("steps").as_array()) {
    probe.step(trainer, value.as_object(), "step" + std::to_string(index++));
  }
  if (const json::value* list = job.if_contains("generate")) {
    index = 0;
    for (const json::value& value : list->as_array()) {
      probe.generate(value.as_object(), "generate" + std::to_string(index++));
    }
  }
  probe.save_all("weights", false);
  for (std::size_t i = 0; i < probe.adapters.size(); ++i) {
    save_adapter_state(probe.adapters[i], probe.out / ("state" + std::to_string(i) + ".safetensors"));
  }
  safetensors::write_file(probe.out / "results.safetensors", probe.tensors);
  std::ofstream(probe.out / "results.json")
      << json::serialize(json::object{{"calls", probe.calls},
                                      {"metrics", probe.metrics},
                                      {"generated", probe.generated},
                                      {"peak_mib", static_cast<double>(memory_of_process("VmHWM")) / (1 << 20)}});
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: engine_probe MODEL_DIR JOB.json OUT_DIR\n");
    return 2;
  }
  try {
    return run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "engine_probe: %s\n", error.what());
    return 1;
  }
}
