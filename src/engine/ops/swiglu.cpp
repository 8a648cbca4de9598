#include "engine/ops/swiglu.h"

#include <ATen/ATen.h>

#include "engine/ops/parallel_rows.h"

namespace ht::engine {

at::Tensor swiglu_forward(const Device& device, const at::Tensor& gate_up) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = gate_up.size(0), n = gate_up.size(1) / 2;
  at::Tensor act = at::empty({rows, n}, gate_up.options());
  const void* in = gate_up.const_data_ptr();
  void* out = act.data_ptr();
  launch_rows(kernels, rows, n, [&](std::int64_t begin, std::int64_t end) {
    kernels.swiglu_forward(device.stream(), in, out, n, begin, end);
  });
  return act;
}

void swiglu_backward(const Device& device, const at::Tensor& dact, at::Tensor& gate_up) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = gate_up.size(0), n = gate_up.size(1) / 2;
  const void* dy = dact.const_data_ptr();
  void* in = gate_up.data_ptr();
  launch_rows(kernels, rows, n, [&](std::int64_t begin, std::int64_t end) {
    kernels.swiglu_backward(device.stream(), dy, in, n, begin, end);
  });
}

at::Tensor swiglu_reference(const at::Tensor& gate_up) {
  const auto parts = gate_up.chunk(2, -1);
  return at::silu(parts[0]) * parts[1];
}

}  // namespace ht::engine
