// The work of a prefill.
#pragma once

#include <cuda.h>

#include "common/indices.cuh"
#include "params.h"
#include "sm90/chunk_kda/loader.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda_fwd/config.h"

namespace flashkda::chunk_kda_fwd {

using namespace chunk_kda;

struct Arguments {
  CUtensorMap q, k, v, g;
  ChunkKdaFwdParams p;
  SegmentArguments segmented;
  ShareArguments shares;
  const Checkpoint* checkpoints;  // [sequences, p.pool.checkpoints], in order
};

// Beside two scans, which take their time.
template <typename L>
using PrefillLoader = Loader<L, L::kScans == 2 ? 4 : L::kStages>;

// A run of chunks: a whole sequence, or a segment of one.
struct Item {
  int batch;
  int begin;
  int length;
  int value_head;
  int sequence;
  int part;
  int segment;
  int flags;
};

// Of a sequence, its tokens and its value head; in segments, without what the sequence is.
template <bool kSegments>
__device__ __forceinline__ Item make_item(const Arguments& arguments, int sequence, int value_head, int segment,
                                          int part) {
  const ChunkKdaFwdParams& p = arguments.p;
  Item item = {sequence, 0, int(p.tokens), value_head, sequence, part, segment, kFromStart | kToEnd};
  if constexpr (kSegments) {
    const int segment_tokens = arguments.segmented.segment_chunks * kChunk;
    item.begin = segment * segment_tokens;
    const bool last = segment == arguments.segmented.segments - 1;
    item.length = (last ? int(p.tokens) : item.begin + segment_tokens) - item.begin;
    item.flags = (segment == 0 ? kFromStart : 0) | (last ? kToEnd : 0);
  } else if (p.cu_seqlens) {
    const int* offsets = packed_offsets(p.workspace, p.sequences);
    item.batch = 0;
    item.begin = offsets[sequence];
    item.length = offsets[sequence + 1] - item.begin;
  }
  return item;
}

// Earlier segments first: a block may wait for those of lower indices. Packed sequences from the longest on.
template <int kScans, bool kSegments>
__device__ __forceinline__ Item read_item(const Arguments& arguments, int index) {
  const ChunkKdaFwdParams& p = arguments.p;
  constexpr int kHalves = 3 - kScans;
  const int part = index % kHalves;
  index /= kHalves;
  int segment = 0;
  if constexpr (kSegments) {
    const int heads = p.sequences * p.value_heads;
    segment = index / heads;
    index -= segment * heads;
  }
  int sequence = index / p.value_heads;
  const int value_head = index - sequence * p.value_heads;
  if (!kSegments && p.cu_seqlens) sequence = packed_sequence(p.workspace, p.sequences, sequence).index;
  return make_item<kSegments>(arguments, sequence, value_head, segment, part);
}

// Where the state of an item's value head comes from (null for zero) and goes to (null for nowhere).
struct StatePlaces {
  const void* initial;
  void* final;
};

__device__ __forceinline__ char* pool_state(const ChunkKdaFwdParams& p, int64_t row, int value_head) {
  const int64_t element = row * p.pool.stride + value_head * (kHeadDim * kHeadDim);
  return static_cast<char*>(p.pool.states) + element * (p.pool.dtype == Dtype::kFloat32 ? 4 : 2);
}

// The row of a sequence in the pool; negative where the sequence is padding.
__device__ __forceinline__ int64_t pool_row(const StatePool& pool, int sequence) {
  const int64_t row = load_index(pool.indices, sequence * pool.indices.stride);
  return row < pool.rows ? row : -1;
}

// A row of a pool is read and written for one item alone, which reads it first. So a call in segments, where the last
// segment of a sequence may end before the first begins, finds its initial states elsewhere (pool.cuh).
__device__ __forceinline__ StatePlaces find_states(const ChunkKdaFwdParams& p, const Item& item, int64_t row) {
  const int64_t dense = (int64_t(item.sequence) * p.value_heads + item.value_head) * (kHeadDim * kHeadDim);
  const bool from_start = item.flags & kFromStart, to_end = item.flags & kToEnd;
  StatePlaces places = {};
  if (p.initial_state && from_start) places.initial = p.initial_state + dense;
  if (!p.pool.states) {
    if (p.final_state && to_end) places.final = p.final_state + dense;
  } else if (item.length > 0) {
    char* const state = pool_state(p, row, item.value_head);
    if (!p.initial_state && from_start && (!p.pool.has_initial_state || p.pool.has_initial_state[item.sequence]))
      places.initial = state;
    if (to_end) places.final = state;
  }
  return places;
}

// What a state is read and written as; without a pool, fp32.
__device__ __forceinline__ bool reads_bf16(const ChunkKdaFwdParams& p) {
  return !p.initial_state && p.pool.dtype == Dtype::kBFloat16;
}
__device__ __forceinline__ bool writes_bf16(const ChunkKdaFwdParams& p) { return p.pool.dtype == Dtype::kBFloat16; }

// The same places, the initial state on its way to L2.
__device__ __forceinline__ StatePlaces fetch_states(const ChunkKdaFwdParams& p, const Item& item, int64_t row) {
  const StatePlaces places = find_states(p, item, row);
  if (places.initial && item.part == 0)
    cute::SM90_BULK_COPY_G2S::PREFETCH::copy(places.initial, kHeadDim * kHeadDim * (reads_bf16(p) ? 2 : 4));
  return places;
}

// What a chunk of an item is, from a token on with so many left of the run.
__device__ __forceinline__ void describe(ChunkInfo* info, const Item& item, int token, int left, int flags, int chunks,
                                         const StatePlaces& states) {
  info->token = token;
  info->batch = item.batch;
  info->value_head = item.value_head;
  info->sequence = item.sequence;
  info->left = left;
  info->part = item.part;
  info->segment = item.segment;
  info->flags = flags;
  info->chunks = chunks;
  info->initial_state = states.initial;
  info->final_state = states.final;
}

}  // namespace flashkda::chunk_kda_fwd
