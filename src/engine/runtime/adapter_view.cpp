#include <ATen/ATen.h>

#include "engine/runtime/forward.h"

namespace ht::engine {

namespace {

// The factors of `count` sites from `first` on, which share one input and lie side by side in a fused linear.
LoraFactors factors_of(const AdapterLayout& layout, const at::Tensor& flat, const at::Tensor& grad, std::size_t first,
                       std::size_t count) {
  LoraFactors factors;
  if (!layout.site(first).enabled) return factors;
  const std::int64_t rank = layout.padded_rank(), in = layout.sites()[first].in_features;
  const std::int64_t stacked = rank * static_cast<std::int64_t>(count);
  const auto view = [](const at::Tensor& buffer, std::int64_t offset, std::int64_t rows, std::int64_t columns) {
    return buffer.narrow(0, offset, rows * columns).view({rows, columns});
  };
  factors.a = view(flat, layout.site(first).a_offset, stacked, in);
  if (grad.defined()) factors.grad_a = view(grad, layout.site(first).a_offset, stacked, in);
  std::int64_t row = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t out = layout.sites()[first + i].out_features;
    LoraPart part;
    part.out_begin = row;
    part.out_end = row + out;
    part.rank_begin = rank * static_cast<std::int64_t>(i);
    part.rank = rank;
    part.b = view(flat, layout.site(first + i).b_offset, out, rank);
    if (grad.defined()) part.grad_b = view(grad, layout.site(first + i).b_offset, out, rank);
    factors.parts.push_back(std::move(part));
    row += out;
  }
  return factors;
}

}  // namespace

AdapterView make_adapter_view(const Device& device, const AdapterWeights& weights, const at::Tensor& grad) {
  const AdapterLayout& layout = *weights.layout;
  const at::Tensor flat = weights.flat.to(device.torch_device(), device.compute_dtype());
  AdapterView view;
  view.scale = layout.scale();
  const std::size_t num_layers = (layout.sites().size() - 1) / 7;
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    const std::size_t first = layer * 7;
    view.layers.push_back({factors_of(layout, flat, grad, first, 3), factors_of(layout, flat, grad, first + 3, 1),
                           factors_of(layout, flat, grad, first + 4, 2), factors_of(layout, flat, grad, first + 6, 1)});
  }
  view.unembed = factors_of(layout, flat, grad, layout.sites().size() - 1, 1);
  return view;
}

}  // namespace ht::engine
