#pragma once

// Kernels of the sampler: GEMM with few rows, attention over a paged cache, and sums over one row of logits. Plain
// pointers; every function works on a range of independent items so that a caller can split it over threads, and gives
// the same bits however it is split and however many rows are in the batch. AVX-512 or AVX2 is chosen at run time.

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- skinny GEMM -----------------------------------------------------------------------------------------------

enum { HT_SKINNY_MAX_M = 32 };

// y = alpha · x Wᵀ + bias + residual: x [m][ldx], W [n][k] contiguous, y [m][ldy], m <= HT_SKINNY_MAX_M. bias [n] and
// residual [m][ld_residual] may be NULL; residual == y accumulates in place.
typedef struct {
  const float* x;
  int64_t ldx;
  const float* w;
  const float* bias;
  const float* residual;
  int64_t ld_residual;
  float* y;
  int64_t ldy;
  int64_t m, n, k;
  float alpha;
} HtSkinnyGemm;
// Columns [n_begin, n_end) of y.
void ht_skinny_gemm(const HtSkinnyGemm* gemm, int64_t n_begin, int64_t n_end);

// ---- GEMM with a weight in panels ------------------------------------------------------------------------------

// A weight (n, k) in panels of HT_PANEL_COLUMNS columns of y, ht_panel_elements(n, k) elements; what lies beyond n or k
// is zero. float32 and float16: [panel][k][column]; bfloat16: [panel][k / 2][column][k % 2].
enum { HT_PANEL_COLUMNS = 32 };
typedef enum { HT_WEIGHT_F32 = 0, HT_WEIGHT_BF16 = 1, HT_WEIGHT_F16 = 2 } HtWeightType;
int64_t ht_panel_elements(int64_t n, int64_t k);
// Packs panels [panel_begin, panel_end) of w [n][k] float32. Returns 0 if a value is not exactly one of `type`, else 1.
int ht_pack_panels(const float* w, int64_t n, int64_t k, HtWeightType type, void* out, int64_t panel_begin,
                   int64_t panel_end);

// HtSkinnyGemm with W in panels and any m; 16-bit weights are widened in registers, sums are float32.
typedef struct {
  const float* x;
  int64_t ldx;
  const void* w;
  HtWeightType w_type;
  const float* bias;
  const float* residual;
  int64_t ld_residual;
  float* y;
  int64_t ldy;
  int64_t m, n, k;
  float alpha;
} HtPanelGemm;
// The columns of y of panels [panel_begin, panel_end).
void ht_panel_gemm(const HtPanelGemm* gemm, int64_t panel_begin, int64_t panel_end);

// ---- paged attention -------------------------------------------------------------------------------------------

// One layer's cache. Inside a block keys are stored transposed, so that scores of neighbouring positions are
// neighbours:
//   k [num_blocks][kv_heads][head_dim][block_size], v [num_blocks][kv_heads][block_size][head_dim].
typedef struct {
  float* k;
  float* v;
  int64_t kv_heads, head_dim, block_size;
} HtKvCache;

// Stores k and v of rows [row_begin, row_end): row r goes to slots[r] = block · block_size + offset. k and v hold
// kv_heads heads of head_dim in each row, k_stride and v_stride floats apart.
void ht_store_kv(const HtKvCache* cache, const float* k, int64_t k_stride, const float* v, int64_t v_stride,
                 const int64_t* slots, int64_t row_begin, int64_t row_end);

enum { HT_ATTENTION_MAX_ROWS = 32 };

// Query rows [row_begin, row_begin + num_rows) of one sequence, at positions position, position + 1, …, for the query
// heads [head_begin, head_begin + num_heads), which share one key/value head. num_rows · num_heads <=
// HT_ATTENTION_MAX_ROWS. The sequence's positions up to the last row's must be in the cache.
typedef struct {
  const int32_t* block_table;
  int64_t row_begin, num_rows, position;
  int64_t head_begin, num_heads;
} HtQueryTile;

// Causal softmax(q kᵀ · scale) v; with window > 0 position i sees the positions j with i - window < j <= i. Online
// softmax over the blocks in order (Dao et al., "FlashAttention", 2022).
typedef struct {
  HtKvCache cache;
  const float* q;  // [rows][q_stride], heads of head_dim in each row
  int64_t q_stride;
  float* out;  // [rows][out_stride]
  int64_t out_stride;
  int64_t heads, window;
  float scale;
} HtPagedAttention;
void ht_paged_attention(const HtPagedAttention* attention, const HtQueryTile* tiles, int64_t tile_begin,
                        int64_t tile_end);

// ---- one row of logits -----------------------------------------------------------------------------------------

enum { HT_SUM_BLOCK = 256 };

// The largest of n logits; NaN where there is one.
float ht_row_max(const float* logits, int64_t n);
// sums[b] = sum of exp((logits[i] - max) · inverse_temperature) over i in [256 b, min(256 (b + 1), n)); returns the sum
// of all.
double ht_row_exp_sums(const float* logits, int64_t n, float max, float inverse_temperature, double* sums);
// weights[i] = exp((logits[i] - max) · inverse_temperature), the very terms of the sums above.
void ht_row_exp(const float* logits, int64_t n, float max, float inverse_temperature, float* weights);

#ifdef __cplusplus
}
#endif
