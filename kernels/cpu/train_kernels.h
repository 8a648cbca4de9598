#pragma once

// Fused float32 kernels of training and prefill. Plain pointers, row-major; every function works on rows
// [row_begin, row_end) so that a caller can split the rows over threads, and gives the same bits however they are
// split.

#include <stdint.h>

#include "kernels/kernel_table.h"

#ifdef __cplusplus
extern "C" {
#endif

// y = x · rstd · weight, rstd = 1 / sqrt(mean(x²) + eps): RMSNorm (Zhang and Sennrich 2019), transformers'
// LlamaRMSNorm. x, y [rows][n]; weight [n]; rstd [rows] is written.
void ht_rms_norm_forward(const float* x, const float* weight, float* y, float* rstd, int64_t n, float eps,
                         int64_t row_begin, int64_t row_end);
// y from a stored rstd (recompute).
void ht_rms_norm_apply(const float* x, const float* weight, const float* rstd, float* y, int64_t n, int64_t row_begin,
                       int64_t row_end);
// dx += gradient of x, given dy [rows][n]. dx holds the residual path's gradient.
void ht_rms_norm_backward(const float* dy, const float* x, const float* weight, const float* rstd, float* dx, int64_t n,
                          int64_t row_begin, int64_t row_end);

// Per-head RMSNorm (norm_weight [head_dim], NULL: none) followed by rotary embedding in transformers' half-split
// layout. in and out hold `heads` heads of head_dim in each row, rows in_stride and out_stride floats apart; in == out
// is allowed without a norm. cos, sin [rows][head_dim / 2]; rstd [rows][heads] is written when there is a norm.
void ht_norm_rope_forward(const float* in, int64_t in_stride, float* out, int64_t out_stride, const float* cos,
                          const float* sin, const float* norm_weight, float* rstd, float eps, int64_t heads,
                          int64_t head_dim, int64_t row_begin, int64_t row_end);
// din from dout; `in` and rstd are the forward's, used only when there is a norm. din == dout is allowed.
void ht_norm_rope_backward(const float* dout, int64_t dout_stride, const float* in, int64_t in_stride, const float* cos,
                           const float* sin, const float* norm_weight, const float* rstd, float* din,
                           int64_t din_stride, int64_t heads, int64_t head_dim, int64_t row_begin, int64_t row_end);

// act = silu(gate) · up; gate_up [rows][2 n] is gate then up, act [rows][n].
void ht_swiglu_forward(const float* gate_up, float* act, int64_t n, int64_t row_begin, int64_t row_end);
// gate_up is overwritten by its gradient.
void ht_swiglu_backward(const float* dact, float* gate_up, int64_t n, int64_t row_begin, int64_t row_end);

// Log-sum-exp of each row of logits [rows][vocab] (row stride vocab).
void ht_logsumexp(const float* logits, int64_t vocab, float* lse, int64_t row_begin, int64_t row_end);
// logits becomes d(loss)/d(logits): sum over k of dlogprob_k · (onehot(target_k) - softmax). Row r has the targets
// [offsets[r], offsets[r + 1]) of targets and dlogprobs. A row whose dlogprobs are all zero becomes exactly zero,
// whatever its logits.
void ht_dlogits(float* logits, int64_t vocab, const float* lse, const int32_t* targets, const float* dlogprobs,
                const int64_t* offsets, int64_t row_begin, int64_t row_end);

// One AdamW step on elements [begin, end): HtKernelTable::adamw.
void ht_adamw(float* p, const float* grad, float* m, float* v, const HtAdamW* a, int64_t begin, int64_t end);
// Sum of squares of [begin, end) in double.
double ht_sum_of_squares(const float* x, int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
