#include "engine/sampling/adapter_view_cache.h"

#include "engine/runtime/forward.h"

namespace ht::engine {

const AdapterView* AdapterViewCache::get(const AdapterWeights& weights) {
  const auto found = entries_.find(weights.flat.unsafeGetTensorImpl());
  if (found != entries_.end()) return &found->second.view;
  Entry entry{WeakTensor(weights.flat.getIntrusivePtr()), make_adapter_view(weights)};
  return &entries_.emplace(weights.flat.unsafeGetTensorImpl(), std::move(entry)).first->second.view;
}

void AdapterViewCache::drop_dead() {
  std::erase_if(entries_, [](const auto& entry) { return entry.second.flat.expired(); });
}

}  // namespace ht::engine
