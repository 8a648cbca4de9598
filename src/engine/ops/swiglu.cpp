#include "engine/ops/swiglu.h"

#include <ATen/ATen.h>

#include "engine/ops/parallel_rows.h"
#include "kernels/cpu/train_kernels.h"

namespace ht::engine {

at::Tensor swiglu_forward(const at::Tensor& gate_up) {
  const std::int64_t rows = gate_up.size(0), n = gate_up.size(1) / 2;
  at::Tensor act = at::empty({rows, n}, gate_up.options());
  const float* in = gate_up.const_data_ptr<float>();
  float* out = act.data_ptr<float>();
  parallel_rows(rows, n, [&](std::int64_t begin, std::int64_t end) { ht_swiglu_forward(in, out, n, begin, end); });
  return act;
}

void swiglu_backward(const at::Tensor& dact, at::Tensor& gate_up) {
  const std::int64_t rows = gate_up.size(0), n = gate_up.size(1) / 2;
  const float* dy = dact.const_data_ptr<float>();
  float* in = gate_up.data_ptr<float>();
  parallel_rows(rows, n, [&](std::int64_t begin, std::int64_t end) { ht_swiglu_backward(dy, in, n, begin, end); });
}

}  // namespace ht::engine
