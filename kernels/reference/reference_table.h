#pragma once

#include "kernels/kernel_table.h"

#ifdef __cplusplus
extern "C" {
#endif

// Every kernel as its formula reads, in double, one row after another. Tests measure other tables against it, and run
// the engine in a dtype for which this processor has no kernels.
const HtKernelTable* ht_reference_kernels(HtDType dtype);

#ifdef __cplusplus
}
#endif
