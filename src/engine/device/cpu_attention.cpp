#include "engine/device/cpu_attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

namespace ht::engine {

namespace {

// One call of ATen's CPU flash attention: `batch` equally long neighbouring sequences, or a range of queries of one
// sequence with the keys that they reach.
struct Tile {
  std::int64_t batch = 1;
  std::int64_t q_row = 0, q_len = 0;  // first row of the packed q
  std::int64_t k_row = 0, k_len = 0;
  std::int64_t first_query = 0;  // the first query's position among the tile's keys
  bool masked = false;           // else plainly causal
};

// Query rows of a masked tile. The mask has kMaskedTile · (kMaskedTile + window) elements at most.
constexpr std::int64_t kMaskedTile = 512;

std::vector<Tile> make_tiles(const AttentionRanges& ranges, std::int64_t window) {
  std::vector<Tile> tiles;
  for (std::size_t s = 0; s + 1 < ranges.q.size(); ++s) {
    const std::int64_t row = ranges.q[s], length = ranges.q[s + 1] - row;
    const std::int64_t k_row = ranges.k[s], keys = ranges.k[s + 1] - k_row, cached = keys - length;
    if (length == 0) continue;
    if (cached == 0 && (window <= 0 || length <= window)) {
      Tile* last = tiles.empty() ? nullptr : &tiles.back();
      if (last != nullptr && !last->masked && last->q_len == length && last->q_row + last->batch * length == row &&
          last->k_row + last->batch * length == k_row) {
        ++last->batch;
      } else {
        tiles.push_back({1, row, length, k_row, length, 0, false});
      }
      continue;
    }
    for (std::int64_t begin = 0; begin < length; begin += kMaskedTile) {
      const std::int64_t end = std::min(begin + kMaskedTile, length);
      const std::int64_t first_key = window > 0 ? std::max<std::int64_t>(0, cached + begin - window + 1) : 0;
      tiles.push_back(
          {1, row + begin, end - begin, k_row + first_key, cached + end - first_key, cached + begin - first_key, true});
    }
  }
  return tiles;
}

// (rows, heads, d) -> (batch, heads, length, d), a view.
at::Tensor tile_view(const at::Tensor& x, std::int64_t row, std::int64_t batch, std::int64_t length) {
  return x.narrow(0, row, batch * length).unflatten(0, {batch, length}).transpose(1, 2);
}

// Additive mask (q_len, k_len) of a masked tile.
at::Tensor tile_mask(const Tile& tile, std::int64_t window, const at::TensorOptions& options) {
  const at::Tensor i = at::arange(tile.first_query, tile.first_query + tile.q_len, at::kLong).unsqueeze(1);
  const at::Tensor j = at::arange(tile.k_len, at::kLong).unsqueeze(0);
  at::Tensor hidden = j.gt(i);
  if (window > 0) hidden = hidden.logical_or(j.le(i - window));
  return at::zeros({tile.q_len, tile.k_len}, options).masked_fill_(hidden, -std::numeric_limits<double>::infinity());
}

}  // namespace

at::Tensor cpu_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const AttentionRanges& ranges, std::int64_t window, std::vector<at::Tensor>& saved) {
  const std::vector<Tile> tiles = make_tiles(ranges, window);
  const std::int64_t rows = q.size(0), width = q.size(1) * q.size(2);
  saved.clear();
  at::Tensor o;
  for (const Tile& tile : tiles) {
    std::optional<at::Tensor> mask;
    if (tile.masked) mask = tile_mask(tile, window, q.options());
    auto [out, tile_lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        tile_view(q, tile.q_row, tile.batch, tile.q_len), tile_view(k, tile.k_row, tile.batch, tile.k_len),
        tile_view(v, tile.k_row, tile.batch, tile.k_len), 0.0, !tile.masked, mask);
    saved.push_back(std::move(tile_lse));
    if (tiles.size() == 1) return out.transpose(1, 2).reshape({rows, width});
    if (!o.defined()) o = at::empty({rows, width}, q.options());
    o.narrow(0, tile.q_row, tile.batch * tile.q_len).view(out.transpose(1, 2).sizes()).copy_(out.transpose(1, 2));
  }
  return o;
}

void cpu_attention_backward(const at::Tensor& grad_o, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& o, const AttentionRanges& ranges, std::int64_t window,
                            const std::vector<at::Tensor>& saved, at::Tensor& dqkv) {
  const std::vector<Tile> tiles = make_tiles(ranges, window);
  const std::int64_t rows = q.size(0), heads = q.size(1), kv_heads = k.size(1), d = q.size(2);
  const at::Tensor dq = dqkv.narrow(1, 0, heads * d).view({rows, heads, d});
  const at::Tensor dk = dqkv.narrow(1, heads * d, kv_heads * d).view({rows, kv_heads, d});
  const at::Tensor dv = dqkv.narrow(1, (heads + kv_heads) * d, kv_heads * d).view({rows, kv_heads, d});
  const at::Tensor o_heads = o.view({rows, heads, d}), do_heads = grad_o.view({rows, heads, d});
  // Masked tiles of one sequence share keys: theirs are summed.
  if (std::any_of(tiles.begin(), tiles.end(), [](const Tile& t) { return t.masked; })) {
    dqkv.narrow(1, heads * d, 2 * kv_heads * d).zero_();
  }
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    const Tile& tile = tiles[i];
    std::optional<at::Tensor> mask;
    if (tile.masked) mask = tile_mask(tile, window, q.options());
    const auto [tq, tk, tv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        tile_view(do_heads, tile.q_row, tile.batch, tile.q_len), tile_view(q, tile.q_row, tile.batch, tile.q_len),
        tile_view(k, tile.k_row, tile.batch, tile.k_len), tile_view(v, tile.k_row, tile.batch, tile.k_len),
        tile_view(o_heads, tile.q_row, tile.batch, tile.q_len), saved[i], 0.0, !tile.masked, mask);
    tile_view(dq, tile.q_row, tile.batch, tile.q_len).copy_(tq);
    at::Tensor dk_tile = tile_view(dk, tile.k_row, tile.batch, tile.k_len);
    at::Tensor dv_tile = tile_view(dv, tile.k_row, tile.batch, tile.k_len);
    if (tile.masked) {
      dk_tile.add_(tk);
      dv_tile.add_(tv);
    } else {
      dk_tile.copy_(tk);
      dv_tile.copy_(tv);
    }
  }
}

}  // namespace ht::engine
