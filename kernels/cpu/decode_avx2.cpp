#include "kernels/cpu/decode_attention.h"
#include "kernels/cpu/decode_gemm.h"
#include "kernels/cpu/decode_isa.h"
#include "kernels/cpu/decode_panels.h"
#include "kernels/cpu/simd_avx2.h"

namespace ht::kernels {

void skinny_gemm_avx2(const HtSkinnyGemm& gemm, int64_t n_begin, int64_t n_end) {
  skinny_gemm<Avx2>(gemm, n_begin, n_end);
}

void panel_gemm_avx2(const HtPanelGemm& gemm, int64_t panel_begin, int64_t panel_end) {
  panel_gemm<Avx2>(gemm, panel_begin, panel_end);
}

void attend_tile_avx2(const HtPagedAttention& attention, const HtQueryTile& tile, float* scratch) {
  attend_tile<Avx2>(attention, tile, scratch);
}

}  // namespace ht::kernels
