#pragma once

// The launchers behind cuda_table.cpp: the functions of HtKernelTable, one file of kernels each group.

#include "kernels/kernel_table.h"

namespace ht::cuda {

// norms.cu
void rms_norm_forward(HtStream stream, const void* x, const void* weight, void* y, float* rstd, int64_t n, float eps,
                      int64_t row_begin, int64_t row_end);
void rms_norm_apply(HtStream stream, const void* x, const void* weight, const float* rstd, void* y, int64_t n,
                    int64_t row_begin, int64_t row_end);
void rms_norm_backward(HtStream stream, const void* dy, const void* x, const void* weight, const float* rstd, void* dx,
                       int64_t n, int64_t row_begin, int64_t row_end);
void norm_rope_forward(HtStream stream, const HtNormRope* rope, const void* in, int64_t in_stride, void* out,
                       int64_t out_stride, float* rstd, int64_t row_begin, int64_t row_end);
void norm_rope_backward(HtStream stream, const HtNormRope* rope, void* d, int64_t stride, const void* in,
                        int64_t in_stride, const float* rstd, int64_t row_begin, int64_t row_end);

// pointwise.cu
void swiglu_forward(HtStream stream, const void* gate_up, void* act, int64_t n, int64_t row_begin, int64_t row_end);
void swiglu_backward(HtStream stream, const void* dact, void* gate_up, int64_t n, int64_t row_begin, int64_t row_end);
void adamw(HtStream stream, float* p, const float* grad, float* m, float* v, const HtAdamW* a, int64_t begin,
           int64_t end);
void sum_of_squares(HtStream stream, const float* x, int64_t n, int64_t block_size, double* sums, int64_t block_begin,
                    int64_t block_end);

// logprobs.cu
void logsumexp(HtStream stream, const float* logits, int64_t vocab, float* lse, int64_t row_begin, int64_t row_end);
void gather_logprobs(HtStream stream, const float* logits, int64_t vocab, const float* lse, const HtTargets* targets,
                     float* logprobs, int64_t row_begin, int64_t row_end);
void dlogits(HtStream stream, const float* logits, void* dlogits, int64_t vocab, const float* lse,
             const HtTargets* targets, const float* dlogprobs, int64_t row_begin, int64_t row_end);

}  // namespace ht::cuda
