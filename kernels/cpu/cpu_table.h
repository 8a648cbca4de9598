#pragma once

#include "kernels/kernel_table.h"

#ifdef __cplusplus
extern "C" {
#endif

// The float32 kernels of train_kernels.h.
const HtKernelTable* ht_cpu_kernels(void);

#ifdef __cplusplus
}
#endif
