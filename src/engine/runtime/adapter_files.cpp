#include <ATen/ATen.h>

#include <boost/json.hpp>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "base/error.h"
#include "engine/runtime/adapter.h"
#include "safetensors/safetensors.h"

namespace ht::engine {

namespace json = boost::json;
using model_spec::LoraConfig;
using model_spec::LoraSite;
using safetensors::DType;
using safetensors::TensorToWrite;

namespace {

constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";
constexpr const char* kOptimizerFile = "optimizer.safetensors";

std::string tensor_name(const LoraSite& site, char factor) {
  return "base_model.model." + site.module + ".lora_" + factor + ".weight";
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// The factors of a flat buffer at the real rank, to write; `storage` keeps the copies alive.
void collect(const AdapterLayout& layout, const at::Tensor& buffer, const std::string& suffix,
             std::vector<TensorToWrite>& tensors, std::vector<at::Tensor>& storage) {
  const at::Tensor flat = buffer.cpu();
  const std::int64_t rank = layout.rank(), padded = layout.padded_rank();
  for (std::size_t i = 0; i < layout.sites().size(); ++i) {
    if (!layout.site(i).enabled) continue;
    const LoraSite& site = layout.sites()[i];
    const at::Tensor a = flat.narrow(0, layout.site(i).a_offset, rank * site.in_features);
    const at::Tensor b = flat.narrow(0, layout.site(i).b_offset, padded * site.out_features)
                             .view({site.out_features, padded})
                             .narrow(1, 0, rank)
                             .contiguous();
    tensors.push_back({tensor_name(site, 'A') + suffix, DType::f32, {rank, site.in_features}, a.const_data_ptr()});
    tensors.push_back({tensor_name(site, 'B') + suffix, DType::f32, {site.out_features, rank}, b.const_data_ptr()});
    storage.push_back(a);
    storage.push_back(b);
  }
}

const safetensors::TensorView& checked(const safetensors::Checkpoint& file, const std::string& name,
                                       const std::vector<std::int64_t>& shape) {
  const safetensors::TensorView& view = file.at(name);
  if (view.shape != shape) {
    throw user_error("tensor " + name + " has the shape " + shape_text(view.shape) + ", expected " + shape_text(shape));
  }
  return view;
}

// Fills `flat` (zeroed) from the tensors that collect() would write.
void distribute(const AdapterLayout& layout, const safetensors::Checkpoint& file, const std::string& suffix,
                at::Tensor& flat) {
  const std::int64_t rank = layout.rank(), padded = layout.padded_rank();
  float* out = flat.data_ptr<float>();
  std::vector<float> b;
  for (std::size_t i = 0; i < layout.sites().size(); ++i) {
    if (!layout.site(i).enabled) continue;
    const LoraSite& site = layout.sites()[i];
    safetensors::read_rows_f32(checked(file, tensor_name(site, 'A') + suffix, {rank, site.in_features}), 0, rank,
                               out + layout.site(i).a_offset);
    b.resize(static_cast<std::size_t>(rank * site.out_features));
    safetensors::read_rows_f32(checked(file, tensor_name(site, 'B') + suffix, {site.out_features, rank}), 0,
                               site.out_features, b.data());
    for (std::int64_t row = 0; row < site.out_features; ++row) {
      std::memcpy(out + layout.site(i).b_offset + row * padded, b.data() + row * rank,
                  static_cast<std::size_t>(rank) * sizeof(float));
    }
  }
}

json::value lora_json(const LoraConfig& config, const std::string& base_model) {
  json::array targets;
  const auto add = [&](std::initializer_list<const char*> names) {
    for (const char* name : names) targets.emplace_back(name);
  };
  if (config.train_attn) add({"q_proj", "k_proj", "v_proj", "o_proj"});
  if (config.train_mlp) add({"gate_proj", "up_proj", "down_proj"});
  if (config.train_unembed) add({"unembed_tokens"});
  return {{"peft_type", "LORA"},
          {"task_type", "CAUSAL_LM"},
          {"base_model_name_or_path", base_model},
          {"r", config.rank},
          {"lora_alpha", static_cast<int>(model_spec::kLoraAlpha)},
          {"target_modules", targets},
          {"lora_dropout", 0.0},
          {"bias", "none"},
          {"fan_in_fan_out", false},
          {"inference_mode", true},
          {"init_lora_weights", true},
          {"modules_to_save", nullptr},
          {"layers_to_transform", nullptr},
          {"layers_pattern", nullptr},
          {"rank_pattern", json::object{}},
          {"alpha_pattern", json::object{}},
          {"use_rslora", false},
          {"use_dora", false},
          {"revision", nullptr}};
}

std::map<std::string, std::string> config_metadata(const Adapter& adapter) {
  const LoraConfig& c = adapter.weights.layout->config();
  return {{"rank", std::to_string(c.rank)},
          {"seed", std::to_string(c.seed)},
          {"train_attn", c.train_attn ? "1" : "0"},
          {"train_mlp", c.train_mlp ? "1" : "0"},
          {"train_unembed", c.train_unembed ? "1" : "0"},
          {"step", std::to_string(adapter.step)}};
}

const std::string& metadata_value(const safetensors::Checkpoint& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) throw user_error("the adapter file lacks the metadata key " + key);
  return found->second;
}

}  // namespace

std::uint64_t save_adapter_weights(const AdapterWeights& weights, const std::string& base_model,
                                   const std::filesystem::path& dir) {
  std::vector<TensorToWrite> tensors;
  std::vector<at::Tensor> storage;
  collect(*weights.layout, weights.flat, "", tensors, storage);
  safetensors::write_file(dir / kWeightsFile, tensors, {{"format", "pt"}});

  const std::filesystem::path config = dir / kConfigFile, temporary = dir / (std::string(kConfigFile) + ".tmp");
  {
    std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
    out << json::serialize(lora_json(weights.layout->config(), base_model)) << "\n";
    if (!out.flush()) throw server_error("cannot write " + temporary.string());
  }
  std::filesystem::rename(temporary, config);
  return std::filesystem::file_size(config) + std::filesystem::file_size(dir / kWeightsFile);
}

std::uint64_t save_optimizer(const Adapter& adapter, const std::filesystem::path& dir) {
  std::vector<TensorToWrite> tensors;
  std::vector<at::Tensor> storage;
  collect(*adapter.weights.layout, adapter.exp_avg, ".exp_avg", tensors, storage);
  collect(*adapter.weights.layout, adapter.exp_avg_sq, ".exp_avg_sq", tensors, storage);
  tensors.push_back({"step", DType::i64, {1}, &adapter.step});
  safetensors::write_file(dir / kOptimizerFile, tensors);
  return std::filesystem::file_size(dir / kOptimizerFile);
}

LoraConfig read_lora_config(const std::filesystem::path& dir) {
  const std::filesystem::path path = dir / kConfigFile;
  std::ifstream in(path, std::ios::binary);
  if (!in) throw user_error("cannot open " + path.string());
  std::stringstream text;
  text << in.rdbuf();
  boost::system::error_code error;
  const json::value value = json::parse(text.str(), error);
  if (error || !value.is_object()) throw user_error(path.string() + " is no JSON object: " + error.message());
  const json::object& object = value.as_object();
  const auto number = [&](const char* key) {
    const json::value* found = object.if_contains(key);
    if (found == nullptr || !found->is_number()) throw user_error(path.string() + ": " + key + " must be a number");
    return found->to_number<double>();
  };
  if (number("lora_alpha") != model_spec::kLoraAlpha) {
    throw user_error(path.string() + ": lora_alpha is " + std::to_string(number("lora_alpha")) +
                     ", only 32 is supported");
  }
  const double rank = number("r");
  if (!(rank >= 1 && rank <= 256))
    throw user_error(path.string() + ": r is " + std::to_string(rank) + ", allowed are 1 to 256");
  const json::value* targets = object.if_contains("target_modules");
  if (targets == nullptr || !targets->is_array()) {
    throw user_error(path.string() + ": target_modules must be a list of module names");
  }
  std::set<std::string> names;
  for (const json::value& target : targets->as_array()) {
    if (!target.is_string()) throw user_error(path.string() + ": target_modules must be a list of module names");
    const std::string name(target.as_string());
    names.insert(name.substr(name.rfind('.') + 1));
  }
  LoraConfig config;
  config.rank = static_cast<int>(rank);
  config.train_attn = names.contains("q_proj");
  config.train_mlp = names.contains("gate_proj");
  config.train_unembed = names.contains("unembed_tokens");
  return config;
}

AdapterWeights load_adapter_weights(const model_spec::ModelSpec& spec, const std::filesystem::path& dir) {
  auto layout = std::make_shared<const AdapterLayout>(spec, read_lora_config(dir));
  const safetensors::Checkpoint file = safetensors::Checkpoint::open_file(dir / kWeightsFile);
  std::set<std::string> known;
  for (std::size_t i = 0; i < layout->sites().size(); ++i) {
    if (!layout->site(i).enabled) continue;
    known.insert(tensor_name(layout->sites()[i], 'A'));
    known.insert(tensor_name(layout->sites()[i], 'B'));
  }
  for (const std::string& name : file.names()) {
    if (!known.contains(name)) {
      throw user_error("tensor " + name + " in " + (dir / kWeightsFile).string() +
                       " belongs to no LoRA site that adapter_config.json names for this model");
    }
  }
  AdapterWeights weights{layout, at::zeros({layout->numel()}, at::kFloat)};
  distribute(*layout, file, "", weights.flat);
  return weights;
}

void load_optimizer(Adapter& adapter, const std::filesystem::path& dir) {
  const safetensors::Checkpoint file = safetensors::Checkpoint::open_file(dir / kOptimizerFile);
  const AdapterLayout& layout = *adapter.weights.layout;
  const safetensors::TensorView& step = checked(file, "step", {1});
  if (step.dtype != DType::i64) throw user_error("tensor step must have the dtype I64");
  at::Tensor exp_avg = at::zeros({layout.numel()}, at::kFloat), exp_avg_sq = at::zeros({layout.numel()}, at::kFloat);
  distribute(layout, file, ".exp_avg", exp_avg);
  distribute(layout, file, ".exp_avg_sq", exp_avg_sq);
  std::memcpy(&adapter.step, step.data, sizeof(adapter.step));
  adapter.exp_avg = exp_avg.to(adapter.exp_avg.device());
  adapter.exp_avg_sq = exp_avg_sq.to(adapter.exp_avg_sq.device());
}

void save_adapter_state(const Adapter& adapter, const std::filesystem::path& file) {
  const std::int64_t n = adapter.weights.layout->numel();
  std::vector<TensorToWrite> tensors;
  std::vector<at::Tensor> storage;
  const auto add = [&](const char* name, const at::Tensor& buffer) {
    storage.push_back(buffer.cpu());
    tensors.push_back({name, DType::f32, {n}, storage.back().const_data_ptr()});
  };
  add("weights", adapter.weights.flat);
  add("grad", adapter.grad);
  add("exp_avg", adapter.exp_avg);
  add("exp_avg_sq", adapter.exp_avg_sq);
  safetensors::write_file(file, tensors, config_metadata(adapter));
}

Adapter load_adapter_state(const model_spec::ModelSpec& spec, const std::filesystem::path& path, const Device& device) {
  const safetensors::Checkpoint file = safetensors::Checkpoint::open_file(path);
  LoraConfig config;
  config.rank = std::stoi(metadata_value(file, "rank"));
  config.seed = std::stoull(metadata_value(file, "seed"));
  config.train_attn = metadata_value(file, "train_attn") == "1";
  config.train_mlp = metadata_value(file, "train_mlp") == "1";
  config.train_unembed = metadata_value(file, "train_unembed") == "1";
  Adapter adapter;
  adapter.weights.layout = std::make_shared<const AdapterLayout>(spec, config);
  adapter.step = std::stoll(metadata_value(file, "step"));
  const std::int64_t n = adapter.weights.layout->numel();
  const auto read = [&](const char* name) {
    at::Tensor tensor = at::empty({n}, at::kFloat);
    safetensors::read_rows_f32(checked(file, name, {n}), 0, n, tensor.data_ptr<float>());
    return tensor.to(device.torch_device());
  };
  adapter.weights.flat = read("weights");
  adapter.grad = read("grad");
  adapter.exp_avg = read("exp_avg");
  adapter.exp_avg_sq = read("exp_avg_sq");
  return adapter;
}

}  // namespace ht::engine
