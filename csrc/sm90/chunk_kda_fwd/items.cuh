// The work of a prefill, and its loader.
#pragma once

#include <cuda.h>

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

template <int kScans, bool kSegments>
__device__ __forceinline__ Item read_item(const Arguments& arguments, int index) {
  const ChunkKdaFwdParams& p = arguments.p;
  constexpr int kHalves = 3 - kScans;
  Item item;
  item.part = index % kHalves;
  index /= kHalves;
  item.segment = 0;
  if constexpr (kSegments) {
    item.segment = index % arguments.segmented.segments;
    index /= arguments.segmented.segments;
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
    const char* workspace = static_cast<const char*>(p.workspace);
    const chunk_kda::PlanLayout layout = chunk_kda::plan_layout(p.sequences);
    const int* offsets = reinterpret_cast<const int*>(workspace + layout.offsets);
    item.sequence = reinterpret_cast<const int*>(workspace + layout.order)[rank];
    item.batch = 0;
    item.begin = offsets[item.sequence];
    item.length = offsets[item.sequence + 1] - item.begin;
  } else {
    item.sequence = item.batch = rank;
    item.begin = 0;
    item.length = int(p.tokens);
  }
  return item;
}

template <typename L, bool kSegments>
__device__ void load(const Arguments& arguments, uint32_t shared, ChunkInfo* infos, Barriers barriers) {
  const ChunkKdaFwdParams& p = arguments.p;
  const int items = p.sequences * p.value_heads * (3 - L::kScans) * arguments.segmented.segments;
  const int group = p.value_heads / p.heads;
  int* ticket = static_cast<int*>(p.workspace);
  Loader<L> loader{shared, infos, barriers};
  const Maps maps{&arguments.q, &arguments.k, &arguments.v, &arguments.g};

  if constexpr (!kSegments) cudaGridDependencySynchronize();  // the plan
  // Sequences of a dense batch are equally long, so dealing them round is as good as tickets.
  for (int index = blockIdx.x, next; index < items; index = next) {
    next = p.cu_seqlens ? int(gridDim.x) + atomicAdd(ticket, 1) : index + int(gridDim.x);
    const Item item = read_item<L::kScans, kSegments>(arguments, index);
    const int head = item.value_head / group;
    if (p.initial_state && (item.flags & kFromStart) && item.part == 0) {
      const int64_t state = (int64_t(item.sequence) * p.value_heads + item.value_head) * (kHeadDim * kHeadDim);
      cute::SM90_BULK_COPY_G2S::PREFETCH::copy(p.initial_state + state, kHeadDim * kHeadDim * 4);
    }
    const int chunks = item.length > 0 ? (item.length + kChunk - 1) / kChunk : 1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ChunkInfo* info = loader.next_info();
      const int done = chunk * kChunk;
      const int token = item.begin + done;
      info->token = token;
      info->batch = item.batch;
      info->value_head = item.value_head;
      info->sequence = item.sequence;
      info->left = item.length - done;
      info->part = item.part;
      info->segment = item.segment;
      info->flags = item.flags;
      if (item.length > 0) {
        loader.load(maps, item.batch, token, head, item.value_head, item.part);
      } else {
        loader.skip();
      }
    }
  }
  loader.finish();
}

}  // namespace flashkda::chunk_kda_fwd
