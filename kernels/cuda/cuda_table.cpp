#include "kernels/cuda/cuda_table.h"

#include "kernels/cuda/kernels.h"

namespace {

constexpr HtKernelTable kTable = {.name = "cuda",
                                  .dtype = HT_BF16,
                                  .host_threads = 0,
                                  .rms_norm_forward = ht::cuda::rms_norm_forward,
                                  .rms_norm_apply = ht::cuda::rms_norm_apply,
                                  .rms_norm_backward = ht::cuda::rms_norm_backward,
                                  .norm_rope_forward = ht::cuda::norm_rope_forward,
                                  .norm_rope_backward = ht::cuda::norm_rope_backward,
                                  .swiglu_forward = ht::cuda::swiglu_forward,
                                  .swiglu_backward = ht::cuda::swiglu_backward,
                                  .logsumexp = ht::cuda::logsumexp,
                                  .gather_logprobs = ht::cuda::gather_logprobs,
                                  .dlogits = ht::cuda::dlogits,
                                  .adamw = ht::cuda::adamw,
                                  .sum_of_squares = ht::cuda::sum_of_squares};

}  // namespace

const HtKernelTable* ht_cuda_kernels(void) {
  return &kTable;
}
