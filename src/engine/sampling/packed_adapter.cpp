#include "engine/sampling/packed_adapter.h"

namespace ht::engine {

namespace {

PackedFactors pack_factors(const LoraFactors& factors) {
  PackedFactors packed;
  if (!factors.a.defined()) return packed;
  packed.a = pack_weight(factors.a);
  for (const LoraPart& part : factors.parts) {
    packed.parts.push_back({part.out_begin, part.rank_begin, pack_weight(part.b)});
  }
  return packed;
}

}  // namespace

PackedAdapter pack_adapter(const AdapterView& view) {
  PackedAdapter packed;
  packed.scale = static_cast<float>(view.scale);
  for (const auto& layer : view.layers) {
    std::array<PackedFactors, kLoraSlots>& slots = packed.layers.emplace_back();
    for (std::size_t slot = 0; slot < slots.size(); ++slot) slots[slot] = pack_factors(layer[slot]);
  }
  packed.unembed = pack_factors(view.unembed);
  return packed;
}

}  // namespace ht::engine
