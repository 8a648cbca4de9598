#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "kernels/kernel_table.h"

namespace ht::engine {

// Runs f(row_begin, row_end) over [0, rows) on the engine's threads; a thread gets at least about 16k elements of work.
template <typename F>
void parallel_rows(std::int64_t rows, std::int64_t row_size, const F& f) {
  at::parallel_for(0, rows, std::max<std::int64_t>(1, 16384 / std::max<std::int64_t>(1, row_size)), f);
}

// The same for a kernel of `kernels`: one that brings its own threads gets all rows at once.
template <typename F>
void launch_rows(const HtKernelTable& kernels, std::int64_t rows, std::int64_t row_size, const F& f) {
  if (kernels.host_threads != 0) {
    parallel_rows(rows, row_size, f);
  } else if (rows > 0) {
    f(std::int64_t{0}, rows);
  }
}

}  // namespace ht::engine
