#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <unordered_map>

#include "engine/ops/views.h"
#include "engine/runtime/adapter.h"
#include "engine/sampling/packed_adapter.h"

namespace ht::engine {

// Views of the adapters that were used, kept while their weights live: making one costs hundreds of tensor handles.
class AdapterViewCache {
 public:
  explicit AdapterViewCache(const Device& device) : device_(device) {}

  const AdapterView* get(const AdapterWeights& weights);
  // A copy in the layout of batches of few rows.
  const PackedAdapter* packed(const AdapterWeights& weights);
  // Forgets the views of weights that are gone (a view keeps their memory).
  void drop_dead();

 private:
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Entry {
    WeakTensor flat;
    AdapterView view;
    std::optional<PackedAdapter> packed;
  };

  Entry& entry(const AdapterWeights& weights);

  const Device& device_;
  // A weak pointer keeps the tensor's address from being used again, so the address is a safe key.
  std::unordered_map<const c10::TensorImpl*, Entry> entries_;
};

}  // namespace ht::engine
