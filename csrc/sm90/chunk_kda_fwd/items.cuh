// The work of a prefill, and its loader.
#pragma once

#include <cuda.h>

#include "common/indices.cuh"
#include "params.h"
#include "sm90/chunk_kda/loader.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/transition.cuh"

namespace flashkda::chunk_kda_fwd {

using namespace chunk_kda;

struct Arguments {
  CUtensorMap q, k, v, g;
  ChunkKdaFwdParams p;
  SegmentArguments segmented;
  const Checkpoint* checkpoints;  // [sequences, p.pool.checkpoints], in order
};

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

// Earlier segments first: a block may wait for those of lower indices.
template <int kScans, bool kSegments>
__device__ __forceinline__ Item read_item(const Arguments& arguments, int index) {
  const ChunkKdaFwdParams& p = arguments.p;
  constexpr int kHalves = 3 - kScans;
  Item item;
  item.part = index % kHalves;
  index /= kHalves;
  item.segment = 0;
  if constexpr (kSegments) {
    const int heads = p.sequences * p.value_heads;
    item.segment = index / heads;
    index -= item.segment * heads;
  }
  const int rank = index / p.value_heads;
  item.value_head = index - rank * p.value_heads;
  item.flags = kFromStart | kToEnd;
  if constexpr (kSegments) {
    item.sequence = item.batch = rank;
    const int segment_tokens = arguments.segmented.segment_chunks * kChunk;
    item.begin = item.segment * segment_tokens;
    const bool last = item.segment == arguments.segmented.segments - 1;
    item.length = (last ? int(p.tokens) : item.begin + segment_tokens) - item.begin;
    item.flags = (item.segment == 0 ? kFromStart : 0) | (last ? kToEnd : 0);
  } else if (p.cu_seqlens) {
    const PackedSequence packed = packed_sequence(p.workspace, p.sequences, rank);
    item.sequence = packed.index;
    item.batch = 0;
    item.begin = packed.begin;
    item.length = packed.length;
  } else {
    item.sequence = item.batch = rank;
    item.begin = 0;
    item.length = int(p.tokens);
  }
  return item;
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

// Of the items of a block; with kMapsFirst one, of whose segment the transition comes first.
template <typename L, Cut kCut>
__device__ void load(const Arguments& arguments, const Block<L>& block) {
  constexpr bool kSegments = kCut != Cut::kWhole;
  const ChunkKdaFwdParams& p = arguments.p;
  const int items = p.sequences * p.value_heads * (3 - L::kScans) * arguments.segmented.segments;
  const int group = p.value_heads / p.heads;
  int* ticket = static_cast<int*>(p.workspace);
  Loader<L> loader{block.shared, block.infos(), block.barriers};
  const Maps maps{&arguments.q, &arguments.k, &arguments.v, &arguments.g};

  if constexpr (!kSegments) cudaGridDependencySynchronize();  // the plan
  // Sequences of a dense batch are equally long, so dealing them round is as good as tickets.
  for (int index = blockIdx.x, next; index < items; index = next) {
    next = p.cu_seqlens ? int(gridDim.x) + atomicAdd(ticket, 1) : index + int(gridDim.x);
    Item item = read_item<L::kScans, kSegments>(arguments, index);
    const int head = item.value_head / group;
    if constexpr (kCut == Cut::kMapsFirst) {
      Loader<TransitionStage<L>> first{block.shared, block.infos(), block.first_barriers()};
      if (!(item.flags & kToEnd)) {
        const TransitionItem transition{item.part,       item.segment, item.batch, item.sequence,
                                        item.value_head, item.begin,   item.length};
        load_transition(first, maps, Verdict{block.shared + L::kOutput}, transition, head, 0);
      }
      first.finish();
      mbarrier_wait_patiently(block.handover(), 0);
    }
    StatePlaces states = {};
    int flags = item.flags, padding = 0;
    const int64_t row = p.pool.states ? pool_row(p.pool, item.sequence) : 0;
    if (row < 0) {
      flags = kPadding | kFromStart;
      padding = item.length;
      item.length = 0;
    } else {
      states = find_states(p, item, row);
      if (states.initial && item.part == 0)
        cute::SM90_BULK_COPY_G2S::PREFETCH::copy(states.initial, kHeadDim * kHeadDim * (reads_bf16(p) ? 2 : 4));
    }
    // Run by run: up to each checkpoint, then to the end.
    const Checkpoint* checkpoint = arguments.checkpoints + int64_t(item.sequence) * p.pool.checkpoints;
    int checkpoints = p.pool.checkpoints, done = 0;
    bool is_last;
    do {
      is_last = checkpoints == 0 || checkpoint->tokens > item.length;
      const int length = (is_last ? item.length : checkpoint->tokens) - done;
      void* const final_state = is_last ? states.final : pool_state(p, checkpoint->row, item.value_head);
      const int chunks = length > 0 ? (length + kChunk - 1) / kChunk : 1;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        ChunkInfo* info = loader.next_info();
        const int token = item.begin + done + chunk * kChunk;
        info->token = token;
        info->batch = item.batch;
        info->value_head = item.value_head;
        info->sequence = item.sequence;
        info->left = length - chunk * kChunk;
        info->part = item.part;
        info->segment = item.segment;
        info->flags = flags;
        info->chunks = padding;
        info->initial_state = states.initial;
        info->final_state = final_state;
        if (length > 0) {
          loader.load(maps, item.batch, token, head, item.value_head, item.part);
        } else {
          loader.skip();
        }
      }
      done += length;
      flags = kContinues;
      ++checkpoint;
      --checkpoints;
    } while (!is_last);
  }
  loader.finish();
}

}  // namespace flashkda::chunk_kda_fwd
