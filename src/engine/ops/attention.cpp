#include "engine/ops/attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

namespace ht::engine {

namespace {

// One call of ATen's CPU flash attention: `batch` equally long neighbouring sequences, or a range of queries of one
// sequence with the keys that its window reaches.
struct Tile {
  std::int64_t batch = 1;
  std::int64_t q_row = 0, q_len = 0;  // first row of the packed batch
  std::int64_t k_row = 0, k_len = 0;
  bool windowed = false;
};

// Query rows of a windowed tile. The mask has kWindowTile · (kWindowTile + window) elements at most.
constexpr std::int64_t kWindowTile = 512;

std::vector<Tile> make_tiles(std::span<const std::int32_t> cu_seqlens, std::int64_t window) {
  std::vector<Tile> tiles;
  for (std::size_t s = 0; s + 1 < cu_seqlens.size(); ++s) {
    const std::int64_t row = cu_seqlens[s], length = cu_seqlens[s + 1] - row;
    if (length == 0) continue;
    if (window <= 0 || length <= window) {
      Tile* last = tiles.empty() ? nullptr : &tiles.back();
      if (last != nullptr && !last->windowed && last->q_len == length && last->q_row + last->batch * length == row) {
        ++last->batch;
      } else {
        tiles.push_back({1, row, length, row, length, false});
      }
      continue;
    }
    for (std::int64_t begin = 0; begin < length; begin += kWindowTile) {
      const std::int64_t end = std::min(begin + kWindowTile, length);
      const std::int64_t first_key = std::max<std::int64_t>(0, begin - window + 1);
      tiles.push_back({1, row + begin, end - begin, row + first_key, end - first_key, true});
    }
  }
  return tiles;
}

// (rows, heads, d) -> (batch, heads, length, d), a view.
at::Tensor tile_view(const at::Tensor& x, std::int64_t row, std::int64_t batch, std::int64_t length) {
  return x.narrow(0, row, batch * length).unflatten(0, {batch, length}).transpose(1, 2);
}

// Additive mask (q_len, k_len) of a windowed tile.
at::Tensor window_mask(const Tile& tile, std::int64_t window, const at::TensorOptions& options) {
  const at::Tensor i = at::arange(tile.q_row, tile.q_row + tile.q_len, at::kLong).unsqueeze(1);
  const at::Tensor j = at::arange(tile.k_row, tile.k_row + tile.k_len, at::kLong).unsqueeze(0);
  const at::Tensor hidden = at::logical_or(j.gt(i), j.le(i - window));
  return at::zeros({tile.q_len, tile.k_len}, options)
      .masked_fill_(hidden, -std::numeric_limits<double>::infinity());
}

}  // namespace

at::Tensor attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             std::span<const std::int32_t> cu_seqlens, std::int64_t window,
                             std::vector<at::Tensor>& lse) {
  const std::vector<Tile> tiles = make_tiles(cu_seqlens, window);
  const std::int64_t rows = q.size(0), width = q.size(1) * q.size(2);
  lse.clear();
  at::Tensor o;
  for (const Tile& tile : tiles) {
    std::optional<at::Tensor> mask;
    if (tile.windowed) mask = window_mask(tile, window, q.options());
    auto [out, tile_lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        tile_view(q, tile.q_row, tile.batch, tile.q_len), tile_view(k, tile.k_row, tile.batch, tile.k_len),
        tile_view(v, tile.k_row, tile.batch, tile.k_len), 0.0, !tile.windowed, mask);
    lse.push_back(std::move(tile_lse));
    if (tiles.size() == 1) return out.transpose(1, 2).reshape({rows, width});
    if (!o.defined()) o = at::empty({rows, width}, q.options());
    o.narrow(0, tile.q_row, tile.batch * tile.q_len).view(out.transpose(1, 2).sizes()).copy_(out.transpose(1, 2));
  }
  return o;
}

void attention_backward(const at::Tensor& grad_o, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& o, std::span<const std::int32_t> cu_seqlens, std::int64_t window,
                        const std::vector<at::Tensor>& lse, at::Tensor& dqkv) {
  const std::vector<Tile> tiles = make_tiles(cu_seqlens, window);
  const std::int64_t rows = q.size(0), heads = q.size(1), kv_heads = k.size(1), d = q.size(2);
  const at::Tensor dq = dqkv.narrow(1, 0, heads * d).view({rows, heads, d});
  const at::Tensor dk = dqkv.narrow(1, heads * d, kv_heads * d).view({rows, kv_heads, d});
  const at::Tensor dv = dqkv.narrow(1, (heads + kv_heads) * d, kv_heads * d).view({rows, kv_heads, d});
  const at::Tensor o_heads = o.view({rows, heads, d}), do_heads = grad_o.view({rows, heads, d});
  // Windowed tiles of one sequence share keys: theirs are summed.
  if (std::any_of(tiles.begin(), tiles.end(), [](const Tile& t) { return t.windowed; })) {
    dqkv.narrow(1, heads * d, 2 * kv_heads * d).zero_();
  }
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    const Tile& tile = tiles[i];
    std::optional<at::Tensor> mask;
    if (tile.windowed) mask = window_mask(tile, window, q.options());
    const auto [tq, tk, tv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        tile_view(do_heads, tile.q_row, tile.batch, tile.q_len), tile_view(q, tile.q_row, tile.batch, tile.q_len),
        tile_view(k, tile.k_row, tile.batch, tile.k_len), tile_view(v, tile.k_row, tile.batch, tile.k_len),
        tile_view(o_heads, tile.q_row, tile.batch, tile.q_len), lse[i], 0.0, !tile.windowed, mask);
    tile_view(dq, tile.q_row, tile.batch, tile.q_len).copy_(tq);
    at::Tensor dk_tile = tile_view(dk, tile.k_row, tile.batch, tile.k_len);
    at::Tensor dv_tile = tile_view(dv, tile.k_row, tile.batch, tile.k_len);
    if (tile.windowed) {
      dk_tile.add_(tk);
      dv_tile.add_(tv);
    } else {
      dk_tile.copy_(tk);
      dv_tile.copy_(tv);
    }
  }
}

}  // namespace ht::engine
