#include "engine/ops/lora.h"

#include <ATen/ATen.h>

#include "engine/ops/linear.h"

namespace ht::engine {

std::vector<at::Tensor> lora_project(const LoraView& lora, const at::Tensor& x) {
  std::vector<at::Tensor> u(lora.segments().size());
  for (std::size_t i = 0; i < u.size(); ++i) {
    const LoraSegment& segment = lora.segments()[i];
    const LoraFactors* factors = lora.factors(segment);
    if (factors == nullptr) continue;
    u[i] = at::mm(x.narrow(0, segment.row_begin, segment.row_end - segment.row_begin), factors->a.t());
  }
  return u;
}

std::vector<at::Tensor> lora_forward(const LoraView& lora, const at::Tensor& x, at::Tensor& y) {
  std::vector<at::Tensor> u = lora_project(lora, x);
  for (std::size_t i = 0; i < u.size(); ++i) {
    const LoraSegment& segment = lora.segments()[i];
    const LoraFactors* factors = lora.factors(segment);
    if (factors == nullptr) continue;
    at::Tensor y_segment = y.narrow(0, segment.row_begin, segment.row_end - segment.row_begin);
    for (const LoraPart& part : factors->parts) {
      at::Tensor y_part = y_segment.narrow(1, part.out_begin, part.out_end - part.out_begin);
      add_product(y_part, u[i].narrow(1, part.rank_begin, part.rank), part.b.t(), 1.0, segment.adapter->scale);
    }
  }
  return u;
}

void lora_backward(const LoraView& lora, const at::Tensor& x, const std::vector<at::Tensor>& u, const at::Tensor& dy,
                   at::Tensor& dx) {
  for (std::size_t i = 0; i < u.size(); ++i) {
    const LoraSegment& segment = lora.segments()[i];
    const LoraFactors* factors = lora.factors(segment);
    if (factors == nullptr) continue;
    const std::int64_t rows = segment.row_end - segment.row_begin;
    const double scale = segment.adapter->scale;
    const at::Tensor dy_segment = dy.narrow(0, segment.row_begin, rows);
    at::Tensor du = at::empty_like(u[i]);
    for (const LoraPart& part : factors->parts) {
      const at::Tensor dy_part = dy_segment.narrow(1, part.out_begin, part.out_end - part.out_begin);
      at::Tensor du_part = du.narrow(1, part.rank_begin, part.rank);
      at::mm_out(du_part, dy_part, part.b);
      if (part.grad_b.defined()) {
        at::Tensor grad_b = part.grad_b;
        add_product(grad_b, dy_part.t(), u[i].narrow(1, part.rank_begin, part.rank), 1.0, scale);
      }
    }
    if (factors->grad_a.defined()) {
      at::Tensor grad_a = factors->grad_a;
      add_product(grad_a, du.t(), x.narrow(0, segment.row_begin, rows), 1.0, scale);
    }
    if (dx.defined()) dx.narrow(0, segment.row_begin, rows).addmm_(du, factors->a, 1.0, scale);
  }
}

}  // namespace ht::engine
