#pragma once

namespace ht::engine {

// What a block's backward computes again instead of keeping it from the forward pass.
//   none       everything is kept
//   norms_mlp  the norms' outputs and the MLP's intermediates (its gate/up GEMM) are computed again
//   block      only the block's input is kept
enum class Recompute { none, norms_mlp, block };

}  // namespace ht::engine
