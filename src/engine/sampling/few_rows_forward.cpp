#include "engine/sampling/few_rows_forward.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "engine/sampling/thread_team.h"
#include "kernels/cpu/train_kernels.h"

namespace ht::engine {

namespace {

using Segment = FewRowsForward::Segment;

// Tasks a thread gets of a GEMM, about: enough that threads end together though others use the cores too.
constexpr std::int64_t kTasksPerThread = 8;

// A phase with fewer multiply-adds on average is not worth a second thread: meeting costs about as much. Below four
// rows the time is that of reading the weights.
constexpr std::int64_t kParallelWork = 300'000;
constexpr std::int64_t kReadingRows = 4;
constexpr std::int64_t kPhasesOfBlock = 8;

// Work on `panels` panels in tasks of `group`.
struct Split {
  std::int64_t panels = 0, group = 1;
  std::int64_t tasks() const { return (panels + group - 1) / group; }
  std::int64_t begin(std::int64_t task) const { return task * group; }
  std::int64_t end(std::int64_t task) const { return std::min(panels, (task + 1) * group); }
};

Split split(std::int64_t panels, int threads) {
  return {panels, std::clamp<std::int64_t>(panels / (threads * kTasksPerThread), 1, 16)};
}

}  // namespace

// What the threads of one pass share.
struct FewRowsForward::Pass {
  const FewRowsForward& self;
  std::span<const Segment> segments;
  ThreadTeam& team;
  int threads;

  // y = linear(x) + residual with the segments' LoRA; x and y [rows]. `factors` finds a segment's PackedFactors.
  template <typename F>
  void linear(const BaseLinear& linear, std::int64_t rows, const Buffer& x, float* y, std::int64_t ldy,
              const Buffer* residual, std::span<const Segment> on, const F& factors) {
    const bool packed = linear.packed.defined();
    const std::int64_t n = linear.weight.size(0), k = linear.weight.size(1);
    const Split base = split((n + HT_PANEL_COLUMNS - 1) / HT_PANEL_COLUMNS, threads);
    std::int64_t tasks = base.tasks();
    bool any_lora = false;
    for (const Segment& segment : on) {
      const PackedFactors* lora = factors(segment);
      if (lora == nullptr) continue;
      any_lora = true;
      tasks += lora->a.panels();
    }
    const float* bias = linear.bias.defined() ? linear.bias.const_data_ptr<float>() : nullptr;
    team.phase(tasks, [&](std::int64_t task) {
      if (task < base.tasks()) {
        if (packed) {
          HtPanelGemm gemm = panel_gemm(linear.packed, x.data, x.stride, rows, y, ldy);
          gemm.bias = bias;
          if (residual != nullptr) {
            gemm.residual = residual->data;
            gemm.ld_residual = residual->stride;
          }
          ht_panel_gemm(&gemm, base.begin(task), base.end(task));
        } else {
          HtSkinnyGemm gemm{};
          gemm.x = x.data;
          gemm.ldx = x.stride;
          gemm.w = linear.weight.const_data_ptr<float>();
          gemm.bias = bias;
          if (residual != nullptr) {
            gemm.residual = residual->data;
            gemm.ld_residual = residual->stride;
          }
          gemm.y = y;
          gemm.ldy = ldy;
          gemm.m = rows;
          gemm.n = n;
          gemm.k = k;
          gemm.alpha = 1.0f;
          ht_skinny_gemm(&gemm, base.begin(task) * HT_PANEL_COLUMNS, std::min(n, base.end(task) * HT_PANEL_COLUMNS));
        }
        return;
      }
      task -= base.tasks();
      for (const Segment& segment : on) {
        const PackedFactors* lora = factors(segment);
        if (lora == nullptr) continue;
        if (task < lora->a.panels()) {
          const HtPanelGemm gemm =
              panel_gemm(lora->a, x.row(segment.row_begin), x.stride, segment.row_end - segment.row_begin,
                         self.u_.row(segment.row_begin), self.u_.stride);
          ht_panel_gemm(&gemm, task, task + 1);
          return;
        }
        task -= lora->a.panels();
      }
    });
    if (!any_lora) return;

    std::int64_t b_tasks = 0;
    for (const Segment& segment : on) {
      const PackedFactors* lora = factors(segment);
      if (lora == nullptr) continue;
      for (const PackedFactors::Part& part : lora->parts) b_tasks += split(part.b.panels(), threads).tasks();
    }
    team.phase(b_tasks, [&](std::int64_t task) {
      for (const Segment& segment : on) {
        const PackedFactors* lora = factors(segment);
        if (lora == nullptr) continue;
        for (const PackedFactors::Part& part : lora->parts) {
          const Split parts = split(part.b.panels(), threads);
          if (task < parts.tasks()) {
            float* out = y + segment.row_begin * ldy + part.out_begin;
            HtPanelGemm gemm = panel_gemm(part.b, self.u_.row(segment.row_begin) + part.rank_begin, self.u_.stride,
                                          segment.row_end - segment.row_begin, out, ldy);
            gemm.residual = out;
            gemm.ld_residual = ldy;
            gemm.alpha = segment.adapter->scale;
            ht_panel_gemm(&gemm, parts.begin(task), parts.end(task));
            return;
          }
          task -= parts.tasks();
        }
      }
    });
  }

  void norm(const at::Tensor& weight, double eps, std::int64_t rows, std::span<const std::int64_t> picked) {
    const float* w = weight.const_data_ptr<float>();
    team.phase(rows, [&](std::int64_t row) {
      float rstd;
      const std::int64_t from = picked.empty() ? row : picked[static_cast<std::size_t>(row)];
      ht_rms_norm_forward(self.hidden_.row(from), w, self.normed_.row(row), &rstd, weight.size(0),
                          static_cast<float>(eps), 0, 1);
    });
  }

  void attend(const SelfAttention& layer, const RopeTable& rope, std::int64_t rows, PagedAttention& attention) {
    const std::int64_t dim = layer.shape.head_dim;
    const std::int64_t q_size = layer.shape.heads * dim, kv_size = layer.shape.kv_heads * dim;
    const float* cos = rope.cos.const_data_ptr<float>();
    const float* sin = rope.sin.const_data_ptr<float>();
    const float* q_norm = layer.q_norm.defined() ? layer.q_norm.const_data_ptr<float>() : nullptr;
    const float* k_norm = layer.k_norm.defined() ? layer.k_norm.const_data_ptr<float>() : nullptr;
    const auto eps = static_cast<float>(layer.norm_eps);
    team.phase(rows, [&](std::int64_t row) {
      thread_local std::vector<float> rstd;
      rstd.resize(static_cast<std::size_t>(layer.shape.heads));
      const float* in = self.qkv_.row(row);
      const float* row_cos = cos + row * (dim / 2);
      const float* row_sin = sin + row * (dim / 2);
      ht_norm_rope_forward(in, 0, self.q_.row(row), 0, row_cos, row_sin, q_norm, rstd.data(), eps, layer.shape.heads,
                           dim, 0, 1);
      ht_norm_rope_forward(in + q_size, 0, self.k_.row(row), 0, row_cos, row_sin, k_norm, rstd.data(), eps,
                           layer.shape.kv_heads, dim, 0, 1);
      attention.store(layer.layer, self.k_.data, self.k_.stride, self.qkv_.data + q_size + kv_size, self.qkv_.stride,
                      row, row + 1);
    });
    const HtPagedAttention arguments =
        attention.arguments(layer.layer, self.q_.data, self.q_.stride, self.attended_.data, self.attended_.stride);
    const std::span<const HtQueryTile> tiles = attention.tiles();
    team.phase(static_cast<std::int64_t>(tiles.size()),
               [&](std::int64_t tile) { ht_paged_attention(&arguments, tiles.data(), tile, tile + 1); });
  }

  void block(const DecoderBlock& block, const RopeTable& rope, std::int64_t rows, PagedAttention& attention) {
    const auto lora_of = [&](LoraSlot slot) {
      return [&block, slot](const Segment& segment) -> const PackedFactors* {
        if (segment.adapter == nullptr) return nullptr;
        const PackedFactors& found =
            segment.adapter->layers[static_cast<std::size_t>(block.attention.layer)][static_cast<std::size_t>(slot)];
        return found.a.defined() ? &found : nullptr;
      };
    };
    norm(block.attention_norm, block.norm_eps, rows, {});
    linear(block.attention.qkv, rows, self.normed_, self.qkv_.data, self.qkv_.stride, nullptr, segments,
           lora_of(LoraSlot::qkv));
    attend(block.attention, rope, rows, attention);
    linear(block.attention.o, rows, self.attended_, self.hidden_.data, self.hidden_.stride, &self.hidden_, segments,
           lora_of(LoraSlot::o));
    norm(block.mlp_norm, block.norm_eps, rows, {});
    linear(block.mlp.gate_up, rows, self.normed_, self.gate_up_.data, self.gate_up_.stride, nullptr, segments,
           lora_of(LoraSlot::gate_up));
    team.phase(rows, [&](std::int64_t row) {
      ht_swiglu_forward(self.gate_up_.row(row), self.act_.row(row), block.mlp.down.weight.size(1), 0, 1);
    });
    linear(block.mlp.down, rows, self.act_, self.hidden_.data, self.hidden_.stride, &self.hidden_, segments,
           lora_of(LoraSlot::down));
  }
};

FewRowsForward::Buffer FewRowsForward::make_buffer(std::int64_t columns) {
  const std::int64_t stride = (columns + 15) / 16 * 16 + 16;
  const at::Tensor tensor = at::empty({kMaxRows, stride}, at::kFloat);
  return {tensor, tensor.data_ptr<float>(), stride};
}

FewRowsForward::FewRowsForward(const DenseDecoder& model)
    : model_(model),
      hidden_(make_buffer(model.spec.hidden_size)),
      normed_(make_buffer(model.spec.hidden_size)),
      qkv_(make_buffer(model.spec.q_size() + 2 * model.spec.kv_size())),
      q_(make_buffer(model.spec.q_size())),
      k_(make_buffer(model.spec.kv_size())),
      attended_(make_buffer(model.spec.q_size())),
      gate_up_(make_buffer(2 * std::int64_t{model.spec.intermediate_size})),
      act_(make_buffer(model.spec.intermediate_size)) {
  weights_ = model.head.unembedding.weight.numel();
  for (const DecoderBlock& block : model.blocks) {
    for (const BaseLinear* linear : {&block.attention.qkv, &block.attention.o, &block.mlp.gate_up, &block.mlp.down}) {
      weights_ += linear->weight.numel();
    }
  }
}

void FewRowsForward::run(const PackedSequences& batch, std::span<const Segment> segments, PagedAttention& attention,
                         std::span<const std::int64_t> wanted, float* logits) {
  const std::int64_t rows = batch.num_tokens(), hidden = model_.spec.hidden_size;
  const RopeTable rope = rope_table(model_.spec, batch);
  const float* embedding = model_.embedding.const_data_ptr<float>();
  for (std::int64_t row = 0; row < rows; ++row) {
    std::memcpy(hidden_.row(row), embedding + std::int64_t{batch.tokens[static_cast<std::size_t>(row)]} * hidden,
                static_cast<std::size_t>(hidden) * sizeof(float));
  }
  // The adapters' ranks may differ: u takes the widest.
  std::int64_t widest = 1;
  for (const Segment& segment : segments) {
    if (segment.adapter == nullptr) continue;
    for (const auto& layer : segment.adapter->layers) {
      for (const PackedFactors& factors : layer) widest = std::max(widest, factors.a.n);
    }
    widest = std::max(widest, segment.adapter->unembed.a.n);
  }
  if (u_.stride < widest) u_ = make_buffer(widest);
  // The segments in rows of the logits.
  std::vector<Segment> head_segments;
  for (std::size_t i = 0, segment = 0; i < wanted.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i);
    while (wanted[i] >= segments[segment].row_end) ++segment;
    if (head_segments.empty() || head_segments.back().adapter != segments[segment].adapter) {
      head_segments.push_back({row, row, segments[segment].adapter});
    }
    head_segments.back().row_end = row + 1;
  }
  const auto head_lora = [](const Segment& segment) {
    return segment.adapter != nullptr && segment.adapter->unembed.a.defined() ? &segment.adapter->unembed : nullptr;
  };
  const std::int64_t vocab = model_.spec.vocab_size;
  const std::int64_t work = std::max(rows, kReadingRows) * weights_;
  const std::int64_t phases = kPhasesOfBlock * static_cast<std::int64_t>(model_.blocks.size()) + 2;
  const int wanted_threads = work < kParallelWork * phases ? 1 : at::get_num_threads();
  std::optional<ThreadTeam> team;
#pragma omp parallel num_threads(wanted_threads)
  {
#pragma omp single
    team.emplace(omp_get_num_threads());
    Pass pass{*this, segments, *team, omp_get_num_threads()};
    for (const DecoderBlock& block : model_.blocks) pass.block(block, rope, rows, attention);
    if (!wanted.empty()) {
      pass.norm(model_.final_norm, model_.spec.rms_norm_eps, static_cast<std::int64_t>(wanted.size()), wanted);
      pass.linear(model_.head.unembedding, static_cast<std::int64_t>(wanted.size()), normed_, logits, vocab, nullptr,
                  head_segments, head_lora);
    }
  }
}

}  // namespace ht::engine
