// Everything that is compiled for every processor comes before the pragma: its inline functions are shared with other
// files.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <bit>

#include "kernels/cpu/decode_isa.h"
#include "kernels/cpu/decode_kernels.h"
#include "kernels/cpu/vector_math.h"

// gcc 12 warns of the deliberately undefined operands inside its own intrinsics (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")

#include "kernels/cpu/decode_attention.h"
#include "kernels/cpu/decode_gemm.h"
#include "kernels/cpu/decode_panels.h"
#include "kernels/cpu/simd_avx512.h"

namespace ht::kernels {

void skinny_gemm_avx512(const HtSkinnyGemm& gemm, int64_t n_begin, int64_t n_end) {
  skinny_gemm<Avx512>(gemm, n_begin, n_end);
}

void panel_gemm_avx512(const HtPanelGemm& gemm, int64_t panel_begin, int64_t panel_end) {
  panel_gemm<Avx512>(gemm, panel_begin, panel_end);
}

void attend_tile_avx512(const HtPagedAttention& attention, const HtQueryTile& tile, float* scratch) {
  attend_tile<Avx512>(attention, tile, scratch);
}

}  // namespace ht::kernels
