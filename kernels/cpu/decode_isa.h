#pragma once

// The instances that decode_kernels.cpp chooses from; public so that a test can compare them on one machine.

#include "kernels/cpu/decode_kernels.h"

namespace ht::kernels {

bool has_avx512();

void skinny_gemm_avx2(const HtSkinnyGemm& gemm, int64_t n_begin, int64_t n_end);
void skinny_gemm_avx512(const HtSkinnyGemm& gemm, int64_t n_begin, int64_t n_end);
void panel_gemm_avx2(const HtPanelGemm& gemm, int64_t panel_begin, int64_t panel_end);
void panel_gemm_avx512(const HtPanelGemm& gemm, int64_t panel_begin, int64_t panel_end);
void attend_tile_avx2(const HtPagedAttention& attention, const HtQueryTile& tile, float* scratch);
void attend_tile_avx512(const HtPagedAttention& attention, const HtQueryTile& tile, float* scratch);

}  // namespace ht::kernels
