#include "engine/sampling/step.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <numeric>
#include <random>

#include "base/error.h"
#include "engine/runtime/base_model_impl.h"
#include "engine/runtime/block_loop.h"
#include "engine/runtime/forward.h"
#include "safetensors/safetensors.h"

namespace ht::engine {
namespace {

constexpr int kHidden = 48, kInner = 80, kVocab = 131, kLayers = 3, kBlock = 16;
constexpr double kTolerance = 1e-5;

struct Shape {
  std::string name, architecture, model_type, extra;
  int heads, kv_heads, head_dim;
  bool tied, bias, qk_norm;
  bool bf16 = false;  // weights that 16 bits hold exactly: few rows then read the 16-bit copy, many the float32 one
};

const std::vector<Shape> kShapes = {
    {"llama", "LlamaForCausalLM", "llama", "", 6, 2, 8, true, false, false, true},
    {"qwen2", "Qwen2ForCausalLM", "qwen2", "", 4, 4, 12, false, true, false},
    {"qwen3", "Qwen3ForCausalLM", "qwen3", "", 6, 3, 16, false, false, true},
    // Wide enough that a step of few rows is worth several threads (FewRowsForward's team).
    {"wide", "LlamaForCausalLM", "llama", "", 40, 20, 128, true, false, false, true},
    {"mistral", "MistralForCausalLM", "mistral", R"(, "sliding_window": 9)", 4, 2, 16, false, false, false},
};

// A random checkpoint of the shape, written as files and loaded as any other.
std::unique_ptr<BaseModel> make_model(const Shape& shape) {
  const std::filesystem::path dir =
      std::filesystem::path(testing::TempDir()) / ("ht_sampling_" + shape.name + std::to_string(getpid()));
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "config.json") << R"({"architectures": [")" << shape.architecture << R"("], "model_type": ")"
                                     << shape.model_type << R"(", "hidden_act": "silu", "hidden_size": )" << kHidden
                                     << R"(, "intermediate_size": )" << kInner << R"(, "num_hidden_layers": )"
                                     << kLayers << R"(, "num_attention_heads": )" << shape.heads
                                     << R"(, "num_key_value_heads": )" << shape.kv_heads << R"(, "head_dim": )"
                                     << shape.head_dim << R"(, "vocab_size": )" << kVocab
                                     << R"(, "max_position_embeddings": 512, "rms_norm_eps": 1e-6)"
                                     << R"(, "rope_theta": 10000.0, "tie_word_embeddings": )"
                                     << (shape.tied ? "true" : "false") << shape.extra << "}";
  std::map<std::string, std::vector<std::int64_t>> shapes;
  shapes["model.embed_tokens.weight"] = {kVocab, kHidden};
  shapes["model.norm.weight"] = {kHidden};
  if (!shape.tied) shapes["lm_head.weight"] = {kVocab, kHidden};
  const std::int64_t q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::string block = "model.layers." + std::to_string(layer) + ".", attn = block + "self_attn.";
    shapes[block + "input_layernorm.weight"] = shapes[block + "post_attention_layernorm.weight"] = {kHidden};
    shapes[attn + "q_proj.weight"] = {q, kHidden};
    shapes[attn + "k_proj.weight"] = shapes[attn + "v_proj.weight"] = {kv, kHidden};
    shapes[attn + "o_proj.weight"] = {kHidden, q};
    if (shape.bias) {
      shapes[attn + "q_proj.bias"] = {q};
      shapes[attn + "k_proj.bias"] = shapes[attn + "v_proj.bias"] = {kv};
    }
    if (shape.qk_norm) shapes[attn + "q_norm.weight"] = shapes[attn + "k_norm.weight"] = {shape.head_dim};
    shapes[block + "mlp.gate_proj.weight"] = shapes[block + "mlp.up_proj.weight"] = {kInner, kHidden};
    shapes[block + "mlp.down_proj.weight"] = {kHidden, kInner};
  }
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, 0.15f);
  std::map<std::string, std::vector<float>> data;
  std::vector<safetensors::TensorToWrite> tensors;
  for (const auto& [name, dims] : shapes) {
    std::vector<float>& values = data[name];
    values.resize(
        static_cast<std::size_t>(std::accumulate(dims.begin(), dims.end(), std::int64_t{1}, std::multiplies<>())));
    const float mean = name.find("norm") != std::string::npos ? 1.0f : 0.0f;
    for (float& value : values) {
      value = mean + normal(random);
      if (shape.bf16) value = static_cast<float>(at::BFloat16(value));
    }
    tensors.push_back({name, safetensors::DType::f32, dims, values.data()});
  }
  safetensors::write_file(dir / "model.safetensors", tensors);
  EngineOptions options;
  options.threads = 2;
  auto model = BaseModel::load(dir, options);
  std::filesystem::remove_all(dir);
  EXPECT_EQ(model->impl().model.blocks[0].mlp.down.packed.defined(), shape.bf16);
  return model;
}

AdapterWeights make_adapter(const BaseModel& model, int rank, unsigned seed) {
  model_spec::LoraConfig config;
  config.rank = rank;  // 8 and 16 are stored unpadded: every element may be anything
  AdapterWeights weights = freeze(Adapter::create(model.spec(), config));
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 0.08f);
  float* data = weights.flat.data_ptr<float>();
  for (std::int64_t i = 0; i < weights.flat.numel(); ++i) data[i] = normal(random);
  return weights;
}

std::vector<std::int32_t> random_tokens(int size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(size));
  for (auto& token : tokens) token = static_cast<std::int32_t>(random() % kVocab);
  return tokens;
}

// The trainer's forward: packed causal attention, all logits; log-softmax in double.
std::vector<std::vector<double>> trainer_logprobs(const BaseModel& model, const AdapterWeights* adapter,
                                                  const std::vector<std::int32_t>& tokens, double temperature = 1) {
  const c10::InferenceMode inference;
  std::vector<std::int32_t> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), 0);
  const std::vector<std::int32_t> cu = {0, static_cast<std::int32_t>(tokens.size())};
  AdapterView view;
  if (adapter != nullptr) view = make_adapter_view(cpu_device(), *adapter);
  const LoraSegment segment{0, static_cast<std::int64_t>(tokens.size()), adapter != nullptr ? &view : nullptr};
  const at::Tensor hidden =
      run_blocks(model.impl().model, {tokens, positions, cu}, {&segment, 1}, nullptr, nullptr, Recompute::none, {});
  const at::Tensor all = logits(model, hidden, {&segment, 1}).to(at::kDouble).div(temperature).log_softmax(-1);
  std::vector<std::vector<double>> rows;
  for (std::int64_t i = 0; i < all.size(0); ++i) {
    const double* row = all.data_ptr<double>() + i * kVocab;
    rows.emplace_back(row, row + kVocab);
  }
  return rows;
}

// A sequence in the cache with what a scheduler keeps of it.
struct Sequence {
  const AdapterWeights* adapter = nullptr;
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> table;
  int cached = 0;
  worker_protocol::SamplingParams params;
  std::vector<Draw> draws = {{1, 0}};

  // The next `count` tokens as a step row; it draws when it reaches the end.
  StepRow row(int count) {
    StepRow row;
    row.adapter = adapter;
    row.tokens = std::span<const std::int32_t>(tokens).subspan(static_cast<std::size_t>(cached),
                                                               static_cast<std::size_t>(count));
    row.position = cached;
    row.block_table = table;
    row.params = &params;
    cached += count;
    if (cached == static_cast<int>(tokens.size())) row.draws = draws;
    return row;
  }
};

Sequence make_sequence(const AdapterWeights* adapter, std::vector<std::int32_t> tokens,
                       std::vector<std::int32_t> table) {
  Sequence sequence;
  sequence.adapter = adapter;
  sequence.tokens = std::move(tokens);
  sequence.table = std::move(table);
  return sequence;
}

class Families : public testing::TestWithParam<Shape> {};

TEST_P(Families, PromptScoresInChunksEqualTheTrainersForward) {
  const auto model = make_model(GetParam());
  const AdapterWeights adapter = make_adapter(*model, 8, 3);
  SamplingEngine engine(*model, 16, kBlock);
  const std::vector<std::int32_t> tokens = random_tokens(90, 5);
  const auto expected = trainer_logprobs(*model, &adapter, tokens);
  Sequence sequence = make_sequence(&adapter, tokens, {9, 2, 11, 0, 5, 7});
  for (const int chunk : {1, 5, 40, 44}) {  // skinny and wide GEMMs, borders inside and on a block
    const int begin = sequence.cached;
    StepRow row = sequence.row(chunk);
    const int end = std::min(sequence.cached, 89);
    row.draws = {};
    row.score.row_end = end - begin;
    row.score.next_tokens = std::span<const std::int32_t>(tokens).subspan(static_cast<std::size_t>(begin) + 1,
                                                                          static_cast<std::size_t>(end - begin));
    row.score.topk = 4;
    row.score.target_width = 2;
    std::vector<std::int32_t> targets;
    for (int i = begin; i < end; ++i) targets.insert(targets.end(), {i % 3 == 0 ? -1 : i, kVocab - 1 - i});
    row.score.targets = targets;
    row.score.alt_tokens = 3;
    row.score.seed = 17;
    sequence.params.temperature = 0.7f;
    const auto scaled = trainer_logprobs(*model, &adapter, tokens, 0.7f);
    const StepRowResult result = engine.run({&row, 1})[0];
    ASSERT_EQ(result.error, "");
    ASSERT_EQ(result.draws.size(), 0u);
    ASSERT_EQ(result.prompt_logprobs.size(), static_cast<std::size_t>(end - begin));
    for (int i = begin; i < end; ++i) {
      const auto& row_logprobs = expected[i];
      const std::size_t at = static_cast<std::size_t>(i - begin);
      ASSERT_NEAR(result.prompt_logprobs[at], row_logprobs[tokens[i + 1]], kTolerance) << "position " << i;
      std::vector<double> sorted = row_logprobs;
      std::sort(sorted.rbegin(), sorted.rend());
      for (std::size_t j = 0; j < 4; ++j) {
        ASSERT_NEAR(result.topk_prompt.logprobs[at * 4 + j], sorted[j], kTolerance);
        ASSERT_NEAR(row_logprobs[result.topk_prompt.token_ids[at * 4 + j]], sorted[j], kTolerance);
      }
      ASSERT_EQ(result.target_logprobs[at * 2] == 0.0f, i % 3 == 0);
      ASSERT_NEAR(result.target_logprobs[at * 2], i % 3 == 0 ? 0.0 : row_logprobs[i], kTolerance);
      ASSERT_NEAR(result.target_logprobs[at * 2 + 1], row_logprobs[kVocab - 1 - i], kTolerance);
      for (std::size_t j = 0; j < 3; ++j) {
        ASSERT_NEAR(result.alt_logprobs[at * 3 + j], scaled[i][result.alt_tokens[at * 3 + j]], kTolerance);
      }
    }
  }
}

TEST_P(Families, DecodingEqualsTheTrainersForward) {
  const auto model = make_model(GetParam());
  const AdapterWeights adapter = make_adapter(*model, 16, 4);
  SamplingEngine engine(*model, 16, kBlock);
  Sequence greedy = make_sequence(&adapter, random_tokens(21, 6), {1, 3, 5, 7});
  greedy.params.temperature = 0;
  Sequence warm = make_sequence(&adapter, random_tokens(13, 7), {0, 2, 4, 6});
  warm.params.temperature = 1.4f;
  std::vector<float> greedy_logprobs, warm_logprobs;
  for (int step = 0; step < 40; ++step) {
    std::vector<StepRow> rows = {greedy.row(step == 0 ? 21 : 1), warm.row(step == 0 ? 13 : 1)};
    const auto results = engine.run(rows);
    greedy.tokens.push_back(results[0].draws[0].token);
    greedy_logprobs.push_back(results[0].draws[0].logprob);
    warm.tokens.push_back(results[1].draws[0].token);
    warm_logprobs.push_back(results[1].draws[0].logprob);
  }
  const auto expected = trainer_logprobs(*model, &adapter, greedy.tokens);
  const auto expected_warm = trainer_logprobs(*model, &adapter, warm.tokens, 1.4f);
  for (std::size_t step = 0; step < 40; ++step) {
    const auto& row = expected[20 + step];
    EXPECT_NEAR(greedy_logprobs[step], row[greedy.tokens[21 + step]], kTolerance) << "step " << step;
    EXPECT_NEAR(row[greedy.tokens[21 + step]], *std::max_element(row.begin(), row.end()), kTolerance);
    EXPECT_NEAR(warm_logprobs[step], expected_warm[12 + step][warm.tokens[13 + step]], kTolerance) << "step " << step;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Families, testing::ValuesIn(kShapes), [](const auto& info) { return info.param.name; });

class Steps : public testing::Test {
 protected:
  const std::unique_ptr<BaseModel> model_ = make_model(kShapes[0]);
  SamplingEngine engine_{*model_, 64, kBlock};
};

// Twelve sequences of two adapters and the base, interleaved, prefilling and decoding in the same batches, give what
// each gives alone.
TEST_F(Steps, TheBatchChangesNothing) {
  const AdapterWeights a = make_adapter(*model_, 8, 1), b = make_adapter(*model_, 16, 2);
  const AdapterWeights* adapters[] = {&a, nullptr, &b};
  const auto make = [&](int i, int first_block) {
    Sequence sequence = make_sequence(adapters[i % 3], random_tokens(5 + 3 * i, static_cast<unsigned>(i)), {});
    for (int j = 0; j < 5; ++j) sequence.table.push_back(first_block + j);
    sequence.draws = {{static_cast<std::uint64_t>(100 + i), 0}};
    sequence.params.top_p = i % 2 == 0 ? 1.0f : 0.9f;
    return sequence;
  };
  std::vector<std::vector<DrawResult>> alone(12), together(12);
  for (int i = 0; i < 12; ++i) {
    Sequence sequence = make(i, 40);
    for (int step = 0; step < 8; ++step) {
      StepRow row = sequence.row(static_cast<int>(sequence.tokens.size()) - sequence.cached);
      alone[i].push_back(engine_.run({&row, 1})[0].draws[0]);
      sequence.tokens.push_back(alone[i].back().token);
    }
  }
  SamplingEngine engine(*model_, 64, kBlock);
  std::vector<Sequence> sequences;
  for (int i = 0; i < 12; ++i) sequences.push_back(make(i, 5 * i));
  for (int step = 0; step < 40; ++step) {
    std::vector<StepRow> rows;
    std::vector<int> owners;
    for (int i = 0; i < 12; ++i) {
      Sequence& sequence = sequences[i];
      if (step < i || together[i].size() == 8) continue;  // sequences join one after the other
      const int left = static_cast<int>(sequence.tokens.size()) - sequence.cached;
      rows.push_back(sequence.row(std::min(left, 7 + i % 4)));
      owners.push_back(i);
    }
    if (rows.empty()) continue;
    const auto results = engine.run(rows);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (results[i].draws.empty()) continue;
      together[owners[i]].push_back(results[i].draws[0]);
      sequences[owners[i]].tokens.push_back(results[i].draws[0].token);
    }
  }
  for (int i = 0; i < 12; ++i) {
    ASSERT_EQ(together[i].size(), 8u) << "sequence " << i;
    for (std::size_t step = 0; step < 8; ++step) {
      EXPECT_EQ(together[i][step].token, alone[i][step].token) << "sequence " << i << " step " << step;
      EXPECT_NEAR(together[i][step].logprob, alone[i][step].logprob, kTolerance);
    }
  }
}

TEST_F(Steps, TheSameRowsGiveTheSameBits) {
  const AdapterWeights adapter = make_adapter(*model_, 8, 1);
  std::vector<std::vector<DrawResult>> runs;
  for (int run = 0; run < 2; ++run) {
    Sequence one = make_sequence(&adapter, random_tokens(60, 1), {0, 1, 2, 3});
    Sequence two = make_sequence(nullptr, random_tokens(33, 2), {4, 5, 6});
    one.draws = {{5, 0}, {5, 1}, {5, 2}};
    std::vector<StepRow> rows = {one.row(60), two.row(33)};
    auto results = engine_.run(rows);
    runs.push_back(results[0].draws);
    runs.back().insert(runs.back().end(), results[1].draws.begin(), results[1].draws.end());
  }
  ASSERT_EQ(runs[0].size(), 4u);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(runs[0][i].token, runs[1][i].token);
    EXPECT_EQ(runs[0][i].logprob, runs[1][i].logprob);
  }
}

TEST_F(Steps, DrawsOfOnePromptDifferBySampleAndComeWithTopTokens) {
  Sequence sequence = make_sequence(nullptr, random_tokens(10, 1), {0});
  sequence.draws.clear();
  for (int i = 0; i < 64; ++i) sequence.draws.push_back({9, i});
  StepRow row = sequence.row(10);
  row.topk_sample = 3;
  const auto draws = engine_.run({&row, 1})[0].draws;
  std::map<std::int32_t, int> seen;
  for (const DrawResult& draw : draws) {
    ++seen[draw.token];
    ASSERT_EQ(draw.topk.k, 3);
    ASSERT_EQ(draw.topk.token_ids.size(), 3u);
    EXPECT_GE(draw.topk.logprobs[0], draw.topk.logprobs[1]);
    EXPECT_LE(draw.logprob, draw.topk.logprobs[0]);
  }
  EXPECT_GT(seen.size(), 8u);
}

TEST_F(Steps, ACopiedBlockContinuesAsItsOrigin) {
  Sequence origin = make_sequence(nullptr, random_tokens(21, 1), {0, 1});
  StepRow row = origin.row(21);
  engine_.run({&row, 1});
  engine_.copy_block(1, 7);
  Sequence fork = origin;
  fork.table = {0, 7};
  // The origin writes its block on: the fork must not see it.
  origin.tokens.push_back(3);
  fork.tokens.push_back(8);
  std::vector<StepRow> rows = {origin.row(1), fork.row(1)};
  const auto results = engine_.run(rows);
  for (int i = 0; i < 2; ++i) {
    const auto expected = trainer_logprobs(*model_, nullptr, i == 0 ? origin.tokens : fork.tokens);
    EXPECT_NEAR(results[i].draws[0].logprob, expected[21][results[i].draws[0].token], kTolerance);
  }
}

TEST_F(Steps, ADivergedAdapterFailsItsRowsAlone) {
  AdapterWeights broken = make_adapter(*model_, 8, 1);
  broken.flat.fill_(NAN);
  Sequence bad = make_sequence(&broken, random_tokens(20, 1), {0, 1});
  Sequence good = make_sequence(nullptr, random_tokens(20, 2), {2, 3});
  std::vector<StepRow> rows = {bad.row(20), good.row(20)};
  const auto results = engine_.run(rows);
  EXPECT_NE(results[0].error.find("position 19"), std::string::npos) << results[0].error;
  EXPECT_EQ(results[1].error, "");
  const auto expected = trainer_logprobs(*model_, nullptr, good.tokens);
  EXPECT_NEAR(results[1].draws[0].logprob, expected[19][results[1].draws[0].token], kTolerance);
}

TEST_F(Steps, AnAdapterThatWentAwayIsForgotten) {
  for (unsigned seed = 1; seed < 4; ++seed) {
    const AdapterWeights adapter = make_adapter(*model_, 8, seed);
    Sequence sequence = make_sequence(&adapter, random_tokens(12, 1), {0});
    StepRow row = sequence.row(12);
    const auto draw = engine_.run({&row, 1})[0].draws[0];
    EXPECT_NEAR(draw.logprob, trainer_logprobs(*model_, &adapter, sequence.tokens)[11][draw.token], kTolerance);
  }
}

TEST_F(Steps, RefusesRowsThatAreNoPlan) {
  const auto refused = [&](const std::function<void(Sequence&, StepRow&)>& spoil, const std::string& text) {
    Sequence sequence = make_sequence(nullptr, random_tokens(20, 1), {0, 1});
    StepRow row = sequence.row(20);
    spoil(sequence, row);
    try {
      engine_.run({&row, 1});
      ADD_FAILURE() << "accepted: " << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.category(), ErrorCategory::server);
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  refused([](Sequence& sequence, StepRow&) { sequence.tokens[3] = kVocab; }, "131");
  refused([](Sequence& sequence, StepRow&) { sequence.table[1] = 64; }, "64");
  refused([](Sequence&, StepRow& row) { row.block_table = row.block_table.first(1); }, "20 positions");
  refused([](Sequence&, StepRow& row) { row.score.row_end = 21; }, "score");
  refused([](Sequence&, StepRow& row) { row.params = nullptr; }, "parameters");
  refused([](Sequence&, StepRow& row) { row.tokens = {}; }, "tokens");
}

}  // namespace
}  // namespace ht::engine
