#include "kernels/cpu/cpu_table.h"

#include "kernels/cpu/train_kernels.h"

namespace {

const float* in(const void* p) {
  return static_cast<const float*>(p);
}
float* out(void* p) {
  return static_cast<float*>(p);
}

void gather_logprobs(const float* logits, int64_t vocab, const float* lse, const HtTargets& t, float* logprobs,
                     int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t k = t.offsets[row]; k < t.offsets[row + 1]; ++k) {
      logprobs[k] = logits[row * vocab + t.targets[k]] - lse[row];
    }
  }
}

constexpr HtKernelTable kTable = {
    .name = "cpu",
    .dtype = HT_F32,
    .host_threads = 1,
    .rms_norm_forward = [](HtStream, const void* x, const void* weight, void* y, float* rstd, int64_t n, float eps,
                           int64_t begin,
                           int64_t end) { ht_rms_norm_forward(in(x), in(weight), out(y), rstd, n, eps, begin, end); },
    .rms_norm_apply = [](HtStream, const void* x, const void* weight, const float* rstd, void* y, int64_t n,
                         int64_t begin,
                         int64_t end) { ht_rms_norm_apply(in(x), in(weight), rstd, out(y), n, begin, end); },
    .rms_norm_backward =
        [](HtStream, const void* dy, const void* x, const void* weight, const float* rstd, void* dx, int64_t n,
           int64_t begin,
           int64_t end) { ht_rms_norm_backward(in(dy), in(x), in(weight), rstd, out(dx), n, begin, end); },
    .norm_rope_forward =
        [](HtStream, const HtNormRope* r, const void* x, int64_t x_stride, void* y, int64_t y_stride, float* rstd,
           int64_t begin, int64_t end) {
          ht_norm_rope_forward(in(x), x_stride, out(y), y_stride, r->cos, r->sin, in(r->weight), rstd, r->eps, r->heads,
                               r->head_dim, begin, end);
        },
    .norm_rope_backward =
        [](HtStream, const HtNormRope* r, void* d, int64_t stride, const void* x, int64_t x_stride, const float* rstd,
           int64_t begin, int64_t end) {
          ht_norm_rope_backward(in(d), stride, in(x), x_stride, r->cos, r->sin, in(r->weight), rstd, out(d), stride,
                                r->heads, r->head_dim, begin, end);
        },
    .swiglu_forward = [](HtStream, const void* gate_up, void* act, int64_t n, int64_t begin,
                         int64_t end) { ht_swiglu_forward(in(gate_up), out(act), n, begin, end); },
    .swiglu_backward = [](HtStream, const void* dact, void* gate_up, int64_t n, int64_t begin,
                          int64_t end) { ht_swiglu_backward(in(dact), out(gate_up), n, begin, end); },
    .logsumexp = [](HtStream, const float* logits, int64_t vocab, float* lse, int64_t begin,
                    int64_t end) { ht_logsumexp(logits, vocab, lse, begin, end); },
    .gather_logprobs = [](HtStream, const float* logits, int64_t vocab, const float* lse, const HtTargets* targets,
                          float* logprobs, int64_t begin,
                          int64_t end) { gather_logprobs(logits, vocab, lse, *targets, logprobs, begin, end); },
    .dlogits =
        [](HtStream, const float*, void* dlogits, int64_t vocab, const float* lse, const HtTargets* targets,
           const float* dlogprobs, int64_t begin, int64_t end) {
          ht_dlogits(out(dlogits), vocab, lse, targets->targets, dlogprobs, targets->offsets, begin, end);
        },
    .adamw = [](HtStream, float* p, const float* grad, float* m, float* v, const HtAdamW* a, int64_t begin,
                int64_t end) { ht_adamw(p, grad, m, v, a, begin, end); },
    .sum_of_squares =
        [](HtStream, const float* x, int64_t n, int64_t size, double* sums, int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b) {
            sums[b] = ht_sum_of_squares(x, b * size, (b + 1) * size < n ? (b + 1) * size : n);
          }
        },
};

}  // namespace

const HtKernelTable* ht_cpu_kernels(void) {
  return &kTable;
}
