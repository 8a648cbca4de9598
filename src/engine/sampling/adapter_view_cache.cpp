#include "engine/sampling/adapter_view_cache.h"

#include "engine/runtime/forward.h"

namespace ht::engine {

AdapterViewCache::Entry& AdapterViewCache::entry(const AdapterWeights& weights) {
  const auto found = entries_.find(weights.flat.unsafeGetTensorImpl());
  if (found != entries_.end()) return found->second;
  Entry entry{WeakTensor(weights.flat.getIntrusivePtr()), make_adapter_view(device_, weights), {}};
  return entries_.emplace(weights.flat.unsafeGetTensorImpl(), std::move(entry)).first->second;
}

const AdapterView* AdapterViewCache::get(const AdapterWeights& weights) {
  return &entry(weights).view;
}

const PackedAdapter* AdapterViewCache::packed(const AdapterWeights& weights) {
  Entry& found = entry(weights);
  if (!found.packed) found.packed = pack_adapter(found.view);
  return &*found.packed;
}

void AdapterViewCache::drop_dead() {
  std::erase_if(entries_, [](const auto& entry) { return entry.second.flat.expired(); });
}

}  // namespace ht::engine
