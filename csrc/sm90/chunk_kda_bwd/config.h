// Everything the host decides, from shapes and the number of multiprocessors alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sm90/chunk_kda/config.h"

namespace flashkda::chunk_kda_bwd {

using chunk_kda::kChunk;
using chunk_kda::kHeadDim;

// Tokens whose gradients a block works out at once, from the state that enters them and the gradient of the one that
// leaves. Tiles begin where their sequence does; the last one may have fewer tokens.
constexpr int kTile = 64;
constexpr int kTileChunks = kTile / kChunk;

// A state between tiles, in bf16: V rows, K columns, as two halves of K of 128 rows of 128 bytes each, in the 128-byte
// swizzle that wgmma reads. Byte of (v, k): k / 64 * 16384 + v * 128 + ((k % 64 / 8) ^ (v % 8)) * 16 + k % 8 * 2.
constexpr int kStateBytes = 2 * kHeadDim * kHeadDim;

// The workspace. All parts are 128-byte aligned.
struct WorkspaceLayout {
  size_t plan = 0;             // of a packed call: chunk_kda::PlanLayout
  size_t tile_offsets = 0;     // of a packed call: int32 [sequences + 1], tiles before each sequence
  size_t states = 0;           // [tiles][value_heads][kStateBytes]: entering each tile
  size_t state_gradients = 0;  // [tiles][value_heads][kStateBytes]: of the state leaving each tile
  size_t bias_partials = 0;    // fp32 [tiles][value_heads][128]
  size_t A_log_partials = 0;   // fp32 [tiles][value_heads]
  size_t dq = 0;               // with grouped value heads: fp32 [batch, tokens, value_heads, 128]
  size_t dk = 0;               // the same
  size_t bytes = 0;
};

struct Plan {
  int64_t tiles;               // room for, over all sequences; a packed call may use fewer
  int64_t tiles_per_sequence;  // of a dense call
  int scans;                   // halves of a value head's V that a block of the scan takes
  int scan_grid;
  int gradient_grid;
  WorkspaceLayout workspace;
};

inline Plan plan(int batch, int sequences, int heads, int value_heads, int64_t tokens, bool has_cu_seqlens,
                 int sm_count) {
  Plan plan = {};
  plan.tiles_per_sequence = (tokens + kTile - 1) / kTile;
  // Each sequence of a packed call has less than a tile more than its tokens fill.
  plan.tiles = has_cu_seqlens ? tokens / kTile + sequences : plan.tiles_per_sequence * sequences;

  // Each head is scanned in both directions.
  const int64_t items = 2 * int64_t(sequences) * value_heads;
  plan.scans = 2 * items <= sm_count ? 1 : 2;
  const int64_t blocks = plan.scans == 1 ? 2 * items : items;
  plan.scan_grid = int(blocks < sm_count ? blocks : sm_count);
  const int64_t gradients = plan.tiles * value_heads;
  plan.gradient_grid = int(has_cu_seqlens || gradients > sm_count ? sm_count : gradients);

  size_t bytes = 0;
  const auto part = [&](size_t size) {
    const size_t start = bytes;
    bytes += (size + 127) / 128 * 128;
    return start;
  };
  const size_t images = size_t(plan.tiles) * size_t(value_heads);
  const size_t per_head = size_t(batch) * size_t(tokens) * size_t(value_heads) * kHeadDim * sizeof(float);
  WorkspaceLayout& layout = plan.workspace;
  if (has_cu_seqlens) {
    layout.plan = part(chunk_kda::plan_layout(sequences).bytes);
    layout.tile_offsets = part(sizeof(int32_t) * (size_t(sequences) + 1));
  }
  layout.states = part(images * kStateBytes);
  layout.state_gradients = part(images * kStateBytes);
  layout.bias_partials = part(images * kHeadDim * sizeof(float));
  layout.A_log_partials = part(images * sizeof(float));
  if (heads != value_heads) {
    layout.dq = part(per_head);
    layout.dk = part(per_head);
  }
  layout.bytes = bytes;
  return plan;
}

}  // namespace flashkda::chunk_kda_bwd
