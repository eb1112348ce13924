// Everything the host decides, from shapes and the number of multiprocessors alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sm90/chunk_kda/config.h"

namespace flashkda::chunk_kda_fwd {

using chunk_kda::kChunk;
using chunk_kda::kHeadDim;

// Chunks before a segment that are tried as its start.
constexpr int kProbedChunks = 4;
constexpr int kMinSegmentChunks = 4;

struct Plan {
  int scans;           // halves of a value head's V that a block takes
  int segments;        // of each sequence
  int segment_chunks;  // chunks of a segment; the last one may have fewer
  int grid;
  int probe_grid;  // 0 where there is one segment
  size_t workspace_bytes;
};

// With one_segment, how a sequence is computed depends on nothing but itself.
inline Plan plan(int sequences, int value_heads, int64_t tokens, bool has_cu_seqlens, bool one_segment, int sm_count) {
  const int64_t items = int64_t(sequences) * value_heads;
  Plan plan = {};
  // Half a head is a shorter step, at the price of transforming every chunk twice: for heads that leave blocks idle.
  plan.scans = 2 * items <= sm_count ? 1 : 2;
  int64_t blocks = plan.scans == 1 ? 2 * items : items;

  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  int64_t segments = 1;
  if (!has_cu_seqlens && !one_segment && plan.scans == 1) {
    segments = sm_count / blocks;
    if (segments > chunks / kMinSegmentChunks) segments = chunks / kMinSegmentChunks;
    if (segments < 1) segments = 1;
  }
  plan.segment_chunks = int((chunks + segments - 1) / segments);
  if (plan.segment_chunks < 1) plan.segment_chunks = 1;
  plan.segments = int((chunks + plan.segment_chunks - 1) / plan.segment_chunks);
  if (plan.segments < 1) plan.segments = 1;
  blocks *= plan.segments;

  // A packed call may have padding rows to clear, whatever its sequences hold, so it never runs with few blocks.
  plan.grid = has_cu_seqlens || blocks > sm_count ? sm_count : int(blocks);
  if (plan.segments > 1) {
    const int64_t probes = items * (plan.segments - 1);
    plan.probe_grid = int(probes < sm_count ? probes : sm_count);
    plan.workspace_bytes = sizeof(int32_t) * size_t(items) * size_t(plan.segments);
  }
  if (has_cu_seqlens) plan.workspace_bytes = chunk_kda::plan_layout(sequences).bytes;
  return plan;
}

}  // namespace flashkda::chunk_kda_fwd
