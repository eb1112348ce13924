// Everything the host decides, from shapes and the number of multiprocessors alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashkda::chunk_kda_fwd {

constexpr int kHeadDim = 128;
constexpr int kChunk = 16;  // tokens

struct Plan {
  int grid;
  int scans;     // halves of a value head's V that a block takes
  bool planned;  // cu_seqlens is made safe and work is ordered and counted on the device, in the workspace
  size_t workspace_bytes;
};

// The workspace of a planned launch: the ticket counter, the cleaned cu_seqlens, and the sequences, longest first.
struct WorkspaceLayout {
  size_t ticket = 0;
  size_t offsets = 0;
  size_t order = 0;
  size_t bytes = 0;
};

constexpr WorkspaceLayout workspace_layout(int sequences) {
  WorkspaceLayout layout;
  layout.offsets = 16;
  layout.order = layout.offsets + sizeof(int32_t) * (size_t(sequences) + 1);
  layout.bytes = layout.order + sizeof(int32_t) * size_t(sequences);
  return layout;
}

inline Plan plan(int sequences, int value_heads, bool has_cu_seqlens, int sm_count) {
  const int64_t items = int64_t(sequences) * value_heads;
  Plan plan;
  // Half a head is a shorter step, at the price of transforming every chunk twice: for heads that leave blocks idle.
  plan.scans = 2 * items <= sm_count ? 1 : 2;
  const int64_t blocks = plan.scans == 1 ? 2 * items : items;
  // A packed call may have padding rows to clear, whatever its sequences hold, so it never runs with few blocks.
  plan.grid = has_cu_seqlens || blocks > sm_count ? sm_count : int(blocks);
  plan.planned = has_cu_seqlens;
  plan.workspace_bytes = has_cu_seqlens ? workspace_layout(sequences).bytes : 0;
  return plan;
}

}  // namespace flashkda::chunk_kda_fwd
