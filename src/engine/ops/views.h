#pragma once

// The views that ops take. runtime/ and sampling/ own the storage; nothing here owns more than a tensor handle.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace ht::engine {

// Sequences packed one after another, without padding and without a batch dimension. Sequence i has the rows
// [cu_seqlens[i], cu_seqlens[i + 1]); positions[row] is the row's position in its sequence (rotary embedding).
struct PackedSequences {
  std::span<const std::int32_t> tokens;      // [T]
  std::span<const std::int32_t> positions;   // [T], increasing by one within a sequence
  std::span<const std::int32_t> cu_seqlens;  // [num_sequences + 1]

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(tokens.size()); }
  std::int64_t num_sequences() const { return static_cast<std::int64_t>(cu_seqlens.size()) - 1; }
};

// LoRA of one part of a fused linear (q of q/k/v): y[:, out_begin:out_end] += scale · u[:, rank_begin:rank_begin+r] Bᵀ.
struct LoraPart {
  std::int64_t out_begin = 0;
  std::int64_t out_end = 0;
  std::int64_t rank_begin = 0;  // columns of u = x Aᵀ that feed this part
  std::int64_t rank = 0;        // padded
  at::Tensor b;                 // (out_end - out_begin, rank), compute dtype
  at::Tensor grad_b;            // same shape, float32; undefined when nothing is trained
};

// The factors of one (fused) linear for one adapter. The A's of its parts are stacked: one GEMM gives all u.
struct LoraFactors {
  at::Tensor a;       // (sum of the parts' ranks, in), compute dtype; undefined: this linear has no LoRA
  at::Tensor grad_a;  // same shape, float32; undefined when nothing is trained
  std::vector<LoraPart> parts;
};

// The linears of a decoder layer that carry LoRA, as they are fused.
enum class LoraSlot { qkv = 0, o = 1, gate_up = 2, down = 3 };
inline constexpr int kLoraSlots = 4;

// All factors of one adapter, as views of its flat buffer or of a copy of it in the compute dtype. Built once per
// adapter version, used by every batch.
struct AdapterView {
  double scale = 0;
  std::vector<std::array<LoraFactors, kLoraSlots>> layers;
  LoraFactors unembed;
};

// Rows [row_begin, row_end) of the packed batch use `adapter`; nullptr is the base model.
struct LoraSegment {
  std::int64_t row_begin = 0;
  std::int64_t row_end = 0;
  const AdapterView* adapter = nullptr;
};

// What one linear sees: segments in row order, disjoint. Rows outside every segment use the base weight alone.
class LoraView {
 public:
  static LoraView of_layer(std::span<const LoraSegment> segments, int layer, LoraSlot slot) {
    return LoraView(segments, layer, slot);
  }
  static LoraView of_unembedding(std::span<const LoraSegment> segments) {
    return LoraView(segments, -1, LoraSlot::qkv);
  }

  std::span<const LoraSegment> segments() const { return segments_; }
  // nullptr: the segment has no LoRA on this linear.
  const LoraFactors* factors(const LoraSegment& segment) const {
    if (segment.adapter == nullptr || segment.row_begin == segment.row_end) return nullptr;
    const LoraFactors& found =
        layer_ < 0 ? segment.adapter->unembed
                   : segment.adapter->layers[static_cast<std::size_t>(layer_)][static_cast<std::size_t>(slot_)];
    return found.a.defined() ? &found : nullptr;
  }

 private:
  LoraView(std::span<const LoraSegment> segments, int layer, LoraSlot slot)
      : segments_(segments), layer_(layer), slot_(slot) {}

  std::span<const LoraSegment> segments_;
  int layer_;
  LoraSlot slot_;
};

// What replaces the packed causal attention when keys and values live in a cache: called once per layer with the
// layer's post-rope q [T, heads, head_dim], k [T, kv_heads, head_dim] and v [T, kv_heads, head_dim] (the last dimension
// is contiguous, the rows may be strided). It stores k and v and returns o [T, heads * head_dim], contiguous.
struct InferenceAttention {
  virtual ~InferenceAttention() = default;
  virtual at::Tensor attend(int layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) = 0;
};

}  // namespace ht::engine
