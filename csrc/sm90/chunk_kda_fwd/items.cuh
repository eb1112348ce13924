// The work of a prefill, and its loader.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "params.h"
#include "sm90/chunk_kda/loader.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda_fwd/config.h"

namespace flashkda::chunk_kda_fwd {

using namespace chunk_kda;

struct Arguments {
  CUtensorMap q, k, v, g;
  ChunkKdaFwdParams p;
  int segments;
  int segment_chunks;
  // [sequences, value_heads, segments], where there are several: chunks before the segment from which a state of zero
  // is as good as the true one, or 0 where there are none within reach and the segment belongs to the run before it.
  // From the probe.
  int* warm_ups;
};

// A run of chunks: a whole sequence, or a segment of one and those after it that need its state.
struct Item {
  int batch;
  int begin;
  int length;  // negative for nothing to do
  int value_head;
  int sequence;
  int part;
  int warm;
  int flags;
};

template <int kScans, bool kProbe>
__device__ __forceinline__ Item read_item(const Arguments& arguments, int index) {
  const ChunkKdaFwdParams& p = arguments.p;
  constexpr int kHalves = 3 - kScans;
  const int segments = arguments.segments, segment_tokens = arguments.segment_chunks * kChunk;
  Item item;
  int segment;
  if constexpr (kProbe) {
    segment = index % (segments - 1) + 1;
    index /= segments - 1;
    item.part = segment;
  } else {
    item.part = index % kHalves;
    index /= kHalves;
    segment = index % segments;
    index /= segments;
  }
  const int rank = index / p.value_heads;
  item.value_head = index - rank * p.value_heads;
  item.warm = 0;
  item.flags = kFromStart | kToEnd;
  if (p.cu_seqlens) {
    const char* workspace = static_cast<const char*>(p.workspace);
    const chunk_kda::PlanLayout layout = chunk_kda::plan_layout(p.sequences);
    const int* offsets = reinterpret_cast<const int*>(workspace + layout.offsets);
    item.sequence = reinterpret_cast<const int*>(workspace + layout.order)[rank];
    item.batch = 0;
    item.begin = offsets[item.sequence];
    item.length = offsets[item.sequence + 1] - item.begin;
    return item;
  }
  item.sequence = item.batch = rank;
  item.begin = segment * segment_tokens;
  if constexpr (kProbe) {
    item.length = min(kProbedChunks * kChunk, item.begin);
    item.begin -= item.length;
    return item;
  }
  int end = int(p.tokens);
  if (segments > 1) {
    const int* warm_ups = arguments.warm_ups + index * segments;
    item.flags = segment == 0 ? kFromStart : 0;
    if (segment > 0) {
      item.warm = warm_ups[segment] * kChunk;
      if (item.warm == 0) {
        item.length = -1;
        return item;
      }
    }
    int next = segment + 1;
    while (next < segments && warm_ups[next] == 0) ++next;
    if (next < segments) {
      end = next * segment_tokens;
    } else {
      item.flags |= kToEnd;
    }
  }
  item.begin -= item.warm;
  item.length = end - item.begin;
  return item;
}

template <typename L, bool kProbe>
__device__ void load(const Arguments& arguments, uint32_t shared, ChunkInfo* infos, Barriers barriers) {
  const ChunkKdaFwdParams& p = arguments.p;
  const int items =
      p.sequences * p.value_heads * (kProbe ? arguments.segments - 1 : (3 - L::kScans) * arguments.segments);
  const int group = p.value_heads / p.heads;
  int* ticket = static_cast<int*>(p.workspace);
  Loader<L> loader{shared, infos, barriers};
  const Maps maps{&arguments.q, &arguments.k, &arguments.v, &arguments.g};

  cudaGridDependencySynchronize();  // the plan, or the probe
  // Sequences of a dense batch are equally long, so dealing them round is as good as tickets.
  for (int index = blockIdx.x, next; index < items; index = next) {
    next = p.cu_seqlens ? int(gridDim.x) + atomicAdd(ticket, 1) : index + int(gridDim.x);
    const Item item = read_item<L::kScans, kProbe>(arguments, index);
    if (item.length < 0) continue;
    const int first_half = kProbe ? 0 : item.part;
    const int head = item.value_head / group;
    if (!kProbe && p.initial_state && (item.flags & kFromStart) && first_half == 0) {
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
      info->warm = item.warm;
      info->flags = item.flags;
      if (item.length > 0) {
        loader.load(maps, item.batch, token, head, item.value_head, first_half);
      } else {
        loader.skip();
      }
    }
  }
  loader.finish();
}

}  // namespace flashkda::chunk_kda_fwd
