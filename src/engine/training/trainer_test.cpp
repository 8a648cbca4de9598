#include "engine/training/trainer.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "base/error.h"
#include "engine/device/cuda_library.h"
#include "engine/runtime/test_checkpoint.h"
#include "engine/training/optimizer.h"

namespace ht::engine {
namespace {

using ::testing::HasSubstr;
using worker_protocol::LossKind;
using worker_protocol::TrainBatch;

struct TrainerTest : ::testing::Test {
  TemporaryDirectory temporary;
  std::unique_ptr<BaseModel> model;

  void SetUp() override {
    write_test_checkpoint(temporary.path());
    model = BaseModel::load(temporary.path(), {.threads = 2});
  }
  Adapter adapter(int rank = 4) { return Adapter::create(model->spec(), {.rank = rank, .seed = 3}); }

  static TrainBatch batch() {
    return {.tokens = {1, 2, 3, 4, 5}, .cu_seqlens = {0, 3, 5}, .target_width = {1, 1}, .targets = {2, 3, 4, 5, 6}};
  }
  static MicroBatchItem item(Adapter& adapter, const TrainBatch& batch) {
    return {.adapter = &adapter, .batch = &batch, .datum_end = batch.num_datums()};
  }
  ErrorCategory category_of(const std::function<void()>& f, std::string& message) {
    try {
      f();
    } catch (const Error& error) {
      message = error.what();
      return error.category();
    }
    ADD_FAILURE() << "no error";
    return ErrorCategory::unknown;
  }
};

TEST_F(TrainerTest, RunsTwiceWithTheSameBits) {
  Trainer trainer(*model);
  const TrainBatch b = batch();
  std::vector<Adapter> adapters{adapter(), adapter()};
  std::vector<std::vector<MicroBatchItemResult>> results;
  for (Adapter& a : adapters) {
    const MicroBatchItem items[] = {item(a, b)};
    for (int step = 0; step < 3; ++step) {
      results.push_back(trainer.run(items, true));
      trainer.optim_step(a, {.learning_rate = 1e-2});
    }
  }
  EXPECT_TRUE(at::equal(adapters[0].weights.flat, adapters[1].weights.flat));
  EXPECT_EQ(results[2][0].logprobs, results[5][0].logprobs);
  EXPECT_LT(results[2][0].loss_sum, results[0][0].loss_sum);
}

TEST_F(TrainerTest, PartOfABatchIsTheSameDatums) {
  Trainer trainer(*model);
  const TrainBatch b = batch();
  Adapter whole = adapter();
  const MicroBatchItem all[] = {item(whole, b)};
  const auto expected = trainer.run(all, false);
  MicroBatchItem second = item(whole, b);
  second.datum_begin = 1;
  const MicroBatchItem items[] = {second};
  const auto part = trainer.run(items, false);
  ASSERT_EQ(part[0].logprobs.size(), 2u);
  EXPECT_NEAR(part[0].logprobs[0], expected[0].logprobs[3], 1e-6);
  EXPECT_EQ(whole.grad.abs().sum().item<float>(), 0.0f);
}

TEST_F(TrainerTest, YieldsBetweenBlocks) {
  Trainer trainer(*model);
  const TrainBatch b = batch();
  Adapter a = adapter();
  const MicroBatchItem items[] = {item(a, b)};
  int calls = 0;
  trainer.run(items, true, [&] { ++calls; });
  EXPECT_EQ(calls, 5);  // two blocks, a chunk of the head, two blocks
}

TEST_F(TrainerTest, AFailureLeavesGradientsUntouched) {
  Trainer trainer(*model);
  const TrainBatch b = batch();
  Adapter a = adapter();
  const MicroBatchItem items[] = {item(a, b)};
  trainer.run(items, true);
  const at::Tensor before = a.grad.clone();
  int calls = 0;
  EXPECT_THROW(trainer.run(items, true,
                           [&] {
                             if (++calls == 5) throw std::bad_alloc();
                           }),
               Error);
  EXPECT_TRUE(at::equal(a.grad, before));
  trainer.run(items, true);
  EXPECT_TRUE(at::allclose(a.grad, before * 2));
}

TEST_F(TrainerTest, WrongInputsAreNamed) {
  Trainer trainer(*model);
  Adapter a = adapter(), other = adapter();
  std::string message;
  const auto run = [&](const TrainBatch& b, LossKind loss = LossKind::cross_entropy) {
    MicroBatchItem one = item(a, b);
    one.loss = loss;
    const MicroBatchItem items[] = {one};
    return category_of([&] { trainer.run(items, true); }, message);
  };
  TrainBatch b = batch();
  b.tokens[2] = 31;
  EXPECT_EQ(run(b), ErrorCategory::user);
  EXPECT_THAT(message, HasSubstr("token 31"));
  b = batch();
  b.targets[4] = -1;
  EXPECT_EQ(run(b), ErrorCategory::user);
  EXPECT_THAT(message, HasSubstr("target token -1"));
  b = batch();
  b.weights = {1.0f};
  EXPECT_EQ(run(b), ErrorCategory::user);
  EXPECT_THAT(message, HasSubstr("weights has 1 elements"));
  EXPECT_EQ(run(batch(), LossKind::ppo), ErrorCategory::user);
  EXPECT_EQ(a.grad.abs().sum().item<float>(), 0.0f);

  const TrainBatch good = batch();
  const MicroBatchItem apart[] = {item(a, good), item(other, good), item(a, good)};
  EXPECT_EQ(category_of([&] { trainer.run(apart, true); }, message), ErrorCategory::server);
}

TEST_F(TrainerTest, NoTokensIsNoWork) {
  Trainer trainer(*model);
  Adapter a = adapter();
  const TrainBatch empty{.cu_seqlens = {0}};
  const MicroBatchItem items[] = {item(a, empty)};
  EXPECT_TRUE(trainer.run(items, true)[0].logprobs.empty());
}

TEST_F(TrainerTest, NonFiniteGradientFailsTheStepAndIsCleared) {
  Trainer trainer(*model);
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Adapter a = adapter();
    const at::Tensor weights = a.weights.flat.clone();
    a.grad.fill_(1.0);
    a.grad.narrow(0, 17, 1).fill_(bad);
    std::string message;
    EXPECT_EQ(category_of([&] { trainer.optim_step(a, {}); }, message), ErrorCategory::user);
    EXPECT_TRUE(at::equal(a.weights.flat, weights));
    EXPECT_EQ(a.exp_avg.abs().sum().item<float>(), 0.0f);
    EXPECT_EQ(a.step, 0);
    EXPECT_EQ(a.grad.abs().sum().item<float>(), 0.0f);
    trainer.optim_step(a, {});
    EXPECT_EQ(a.step, 1);
  }
}

TEST_F(TrainerTest, ZeroEpsilonKeepsUntouchedElements) {
  Trainer trainer(*model);
  Adapter a = adapter(2);
  const TrainBatch b = batch();
  const MicroBatchItem items[] = {item(a, b)};
  trainer.run(items, true);
  trainer.optim_step(a, {.eps = 0.0});
  EXPECT_TRUE(at::isfinite(a.weights.flat).all().item<bool>());
}

// The optimizer's kernels of every device against double; "*Cuda*" is skipped where no GPU is.
class OptimizerKernels : public testing::TestWithParam<const char*> {};

TEST_P(OptimizerKernels, AdamWAndNormEqualDouble) {
  const std::string which = GetParam();
  std::string why_not;
  const Device* device = which == "Cpu"         ? &cpu_device()
                         : which == "Reference" ? &reference_device(at::kFloat)
                                                : load_cuda_device(why_not);
  if (device == nullptr) GTEST_SKIP() << "no CUDA: " << why_not;
  const std::int64_t n = 100003;
  const at::Tensor p = at::randn({n}), g = at::randn({n}), m = at::randn({n}), v = at::rand({n});
  g[5] = m[5] = 0.0;
  Adapter adapter;
  adapter.weights.flat = p.clone().to(device->torch_device());
  adapter.grad = g.to(device->torch_device());
  adapter.exp_avg = m.clone().to(device->torch_device());
  adapter.exp_avg_sq = v.clone().to(device->torch_device());
  adapter.step = 2;
  const double norm = global_norm(*device, adapter.grad), exact_norm = g.to(at::kDouble).norm().item<double>();
  EXPECT_NEAR(norm, exact_norm, 1e-9 * exact_norm);
  EXPECT_EQ(norm, global_norm(*device, adapter.grad));
  const worker_protocol::AdamParams params{
      .learning_rate = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .grad_clip_norm = 1.0};
  adamw_step(*device, adapter, params, norm);
  const at::Tensor clipped = g.to(at::kDouble) / (exact_norm + 1e-6);
  const at::Tensor m3 = m.to(at::kDouble) * 0.9 + clipped * 0.1,
                   v3 = v.to(at::kDouble) * 0.95 + clipped.square() * 0.05;
  const at::Tensor step = (m3 / (1 - std::pow(0.9, 3))) / ((v3 / (1 - std::pow(0.95, 3))).sqrt() + 1e-8);
  const at::Tensor expected = p.to(at::kDouble) * (1 - 1e-3) - 1e-2 * step;
  const auto off = [](const at::Tensor& actual, const at::Tensor& exact) {
    return (actual.cpu().to(at::kDouble) - exact).norm().item<double>() / exact.norm().item<double>();
  };
  EXPECT_LT(off(adapter.exp_avg, m3), 2e-7);
  EXPECT_LT(off(adapter.exp_avg_sq, v3), 2e-7);
  EXPECT_LT(off(adapter.weights.flat, expected), 2e-6);
}

INSTANTIATE_TEST_SUITE_P(Devices, OptimizerKernels, testing::Values("Cpu", "Reference", "Cuda"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Optimizer, GlobalNormDoesNotDependOnThreads) {
  const at::Tensor x = at::randn({100003});
  at::set_num_threads(1);
  const double one = global_norm(cpu_device(), x);
  at::set_num_threads(2);
  EXPECT_EQ(global_norm(cpu_device(), x), one);
  EXPECT_NEAR(one, x.to(at::kDouble).norm().item<double>(), 1e-9 * one);
}

}  // namespace
}  // namespace ht::engine
