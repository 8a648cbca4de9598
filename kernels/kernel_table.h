#pragma once

// The fused kernels of training, prefill and head, as one device has them: the interface between engine/ops and
// kernels/. A table is plain C, so that a library which knows neither torch nor this build's C++ can bring one.
//
// `void` pointers hold the table's dtype, the compute dtype of the base model. What is summed or exponentiated stays
// float32 whatever the dtype: rstd, cos and sin, logits, log-sum-exps, logprobs, the adapters' master weights,
// gradients and moments. Arithmetic is float32 at least, and a result is rounded once. Matrices are row-major and
// contiguous but where a stride is given, in elements.
//
// A function works on rows [row_begin, row_end). With host_threads it runs in the calling thread, any split of the rows
// gives the same bits, and the caller splits them over threads. Without, it enqueues its work on `stream` and is called
// once for all rows. No function uses atomic additions: the same call gives the same bits.

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { HT_F32 = 0, HT_BF16 = 1 } HtDType;
typedef void* HtStream;  // cudaStream_t; NULL on a CPU

// Constants of one AdamW step: decay = 1 - lr · weight_decay, step_size = lr / (1 - beta1^t), bias2 = sqrt(1 -
// beta2^t).
typedef struct {
  float grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2, eps;
} HtAdamW;

// Per-head RMSNorm (weight NULL: none) and rotary embedding of `heads` heads in each row.
typedef struct {
  int64_t heads, head_dim;
  const float* cos;  // [rows][head_dim / 2]
  const float* sin;
  const void* weight;  // [head_dim]
  float eps;
} HtNormRope;

// Row r is scored on targets[offsets[r]] … targets[offsets[r + 1] - 1].
typedef struct {
  const int32_t* targets;
  const int64_t* offsets;
} HtTargets;

typedef struct HtKernelTable {
  const char* name;
  HtDType dtype;
  int32_t host_threads;

  // y = x · rstd · weight, rstd = 1 / sqrt(mean(x²) + eps): RMSNorm (Zhang and Sennrich 2019). x, y [rows][n];
  // weight [n]; rstd [rows] is written.
  void (*rms_norm_forward)(HtStream stream, const void* x, const void* weight, void* y, float* rstd, int64_t n,
                           float eps, int64_t row_begin, int64_t row_end);
  // The same y from a stored rstd (recompute).
  void (*rms_norm_apply)(HtStream stream, const void* x, const void* weight, const float* rstd, void* y, int64_t n,
                         int64_t row_begin, int64_t row_end);
  // dx += gradient of x, given dy [rows][n].
  void (*rms_norm_backward)(HtStream stream, const void* dy, const void* x, const void* weight, const float* rstd,
                            void* dx, int64_t n, int64_t row_begin, int64_t row_end);

  // Norm, then rotation in transformers' half-split layout. in == out is allowed without a norm; rstd [rows][heads] is
  // written when there is one.
  void (*norm_rope_forward)(HtStream stream, const HtNormRope* rope, const void* in, int64_t in_stride, void* out,
                            int64_t out_stride, float* rstd, int64_t row_begin, int64_t row_end);
  // The gradient d [rows][stride] of the outputs becomes that of the inputs, in place; `in` and rstd are the forward's,
  // read only when there is a norm.
  void (*norm_rope_backward)(HtStream stream, const HtNormRope* rope, void* d, int64_t stride, const void* in,
                             int64_t in_stride, const float* rstd, int64_t row_begin, int64_t row_end);

  // act = silu(gate) · up; gate_up [rows][2 n] is gate then up, act [rows][n].
  void (*swiglu_forward)(HtStream stream, const void* gate_up, void* act, int64_t n, int64_t row_begin,
                         int64_t row_end);
  // gate_up is overwritten by its gradient.
  void (*swiglu_backward)(HtStream stream, const void* dact, void* gate_up, int64_t n, int64_t row_begin,
                          int64_t row_end);

  // Log-sum-exp of each row of logits [rows][vocab].
  void (*logsumexp)(HtStream stream, const float* logits, int64_t vocab, float* lse, int64_t row_begin,
                    int64_t row_end);
  // logprobs[t] = logits[r][targets[t]] - lse[r]; logprobs is indexed as targets.
  void (*gather_logprobs)(HtStream stream, const float* logits, int64_t vocab, const float* lse,
                          const HtTargets* targets, float* logprobs, int64_t row_begin, int64_t row_end);
  // dlogits = d(loss)/d(logits) = sum over k of dlogprobs_k · (onehot(target_k) - softmax). A row whose dlogprobs are
  // all zero becomes exactly zero, whatever its logits. A float32 table writes over the logits: dlogits == logits.
  void (*dlogits)(HtStream stream, const float* logits, void* dlogits, int64_t vocab, const float* lse,
                  const HtTargets* targets, const float* dlogprobs, int64_t row_begin, int64_t row_end);

  // AdamW on elements [begin, end), torch.optim.AdamW's arithmetic (single tensor), with g = grad · grad_scale:
  //   p *= decay; m = lerp(m, g, 1 - beta1); v = beta2 v + (1 - beta2) g²; p -= step_size · m / (sqrt(v) / bias2 + eps)
  // An element with m = 0 keeps its value even when eps = 0.
  void (*adamw)(HtStream stream, float* p, const float* grad, float* m, float* v, const HtAdamW* a, int64_t begin,
                int64_t end);
  // sums[b] = sum of squares of x [n]'s elements [b · block_size, (b + 1) · block_size), in double.
  void (*sum_of_squares)(HtStream stream, const float* x, int64_t n, int64_t block_size, double* sums,
                         int64_t block_begin, int64_t block_end);
} HtKernelTable;

#ifdef __cplusplus
}
#endif
