#pragma once

#include "kernels/kernel_table.h"

#ifdef __cplusplus
extern "C" {
#endif

// The bfloat16 kernels of this folder. HtStream is a cudaStream_t; every pointer is device memory but those of the
// structs HtNormRope, HtTargets and HtAdamW themselves.
const HtKernelTable* ht_cuda_kernels(void);

#ifdef __cplusplus
}
#endif
