// Everything the host decides, from shapes and the number of multiprocessors alone.
#pragma once

#include <algorithm>
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
  size_t arrivals = 0;         // int32 [tiles][value_heads][kArrivals], where gradients begin beside the scans
  size_t dq = 0;               // with grouped value heads: fp32 [batch, tokens, value_heads, 128]
  size_t dk = 0;               // the same
  size_t bytes = 0;
};

// Of a tile's states: halves, forward and then in reverse; 1 where one is there.
constexpr int kArrivals = 4;

// The tiles that a block of the gradients takes, one after the other: every `step`th position.
struct TileWalk {
  int position;
  int step;
  int end;

  constexpr bool is_left() const { return position < end; }
  constexpr void advance() { position += step; }
};

// Which these are. Where scans leave multiprocessors idle, as many blocks begin beside them. Tiles are ready from the
// middle of a sequence outward, and positions are in that order: the first ones are the early blocks', the others those
// of the blocks that begin where a scan ends.
struct TileOrder {
  int early_blocks;     // 0: all begin when all is ready, and tiles are taken as they lie
  int early_positions;  // of [tiles of a sequence][sequences][value_heads]

  constexpr TileWalk walk(int block, int grid, int images) const {
    if (block < early_blocks) return {block, early_blocks, early_positions};
    return {early_positions + block - early_blocks, grid - early_blocks, images};
  }
  // What lies at a position: [sequences][tiles of a sequence][value_heads].
  constexpr int image(int position, int tiles, int sequences, int value_heads) const {
    if (early_blocks == 0) return position;
    const int heads = sequences * value_heads;
    const int ring = position / heads, head = position - ring * heads, sequence = head / value_heads;
    const int tile = ring % 2 ? tiles / 2 - (ring + 1) / 2 : tiles / 2 + ring / 2;
    return (sequence * tiles + tile) * value_heads + head - sequence * value_heads;
  }
};

// A GPC's blocks, at one a multiprocessor: the most of a cluster. Kernels side by side read their code through a cache
// of the GPC that has no room for both of these, so each has GPCs of its own where there are such clusters.
constexpr int kScanCluster = 16;

// Nanoseconds on an H100, as measured (docs/kernel_notes.md).
constexpr int64_t kScanTileNs = 3100;       // of a tile, in blocks of one scan
constexpr int64_t kGradientTileNs = 20300;  // of a tile of one value head
constexpr int64_t kColdNs = 18000;          // of a block's first tile beside that, while its code comes
// Fewer do not pay for the way that states' arrivals are told.
constexpr int kLeastEarlyBlocks = 16;
constexpr int kLeastEarlyTiles = 16;  // of a sequence

// How many of `gradients` tiles the blocks that begin early take, so that all end together.
constexpr int64_t early_tiles(int64_t gradients, int64_t tiles_per_sequence, int64_t early_blocks,
                              int64_t late_blocks) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t scans = tiles_per_sequence * kScanTileNs, half = scans / 2;  // the first tiles are ready half way
  const int64_t work = gradients * kGradientTileNs - early_blocks * half + late_blocks * kColdNs;
  const int64_t behind = std::max<int64_t>(work, 0) / (early_blocks + late_blocks);
  int64_t best = gradients, best_ns = INT64_MAX;
  for (int64_t n = (half + behind) / kGradientTileNs, last = n + 1; n <= last; ++n) {  // whole tiles a block
    const int64_t early = std::min(n * early_blocks, gradients), late = gradients - early;
    const int64_t early_ns = half + ceil_div(early, early_blocks) * kGradientTileNs;
    const int64_t late_ns = late > 0 ? scans + kColdNs + ceil_div(late, late_blocks) * kGradientTileNs : 0;
    const int64_t ns = std::max(early_ns, late_ns);
    if (early == 0 || ns >= best_ns) continue;
    best = early;
    best_ns = ns;
  }
  return best;
}

struct Plan {
  int64_t tiles;               // room for, over all sequences; a packed call may use fewer
  int64_t tiles_per_sequence;  // of a dense call
  int scans;                   // halves of a value head's V that a block of the scan takes
  int scan_grid;
  int scan_cluster;  // blocks
  int gradient_grid;
  TileOrder order;
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
  plan.scan_cluster = 1;
  const int64_t gradients = plan.tiles * value_heads;
  plan.gradient_grid = int(has_cu_seqlens || gradients > sm_count ? sm_count : gradients);

  const int64_t whole_clusters = (blocks + kScanCluster - 1) / kScanCluster * kScanCluster;
  const int64_t free_blocks = sm_count - whole_clusters;
  if (!has_cu_seqlens && plan.scans == 1 && free_blocks >= kLeastEarlyBlocks &&
      plan.tiles_per_sequence >= kLeastEarlyTiles && gradients > sm_count) {
    plan.scan_grid = int(whole_clusters);
    plan.scan_cluster = kScanCluster;
    plan.order.early_blocks = int(free_blocks);
    plan.order.early_positions =
        int(early_tiles(gradients, plan.tiles_per_sequence, free_blocks, sm_count - free_blocks));
  }

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
  if (plan.order.early_blocks > 0) layout.arrivals = part(images * kArrivals * sizeof(int32_t));
  if (heads != value_heads) {
    layout.dq = part(per_head);
    layout.dk = part(per_head);
  }
  layout.bytes = bytes;
  return plan;
}

}  // namespace flashkda::chunk_kda_bwd
