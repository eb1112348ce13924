// Finds the segments that may start from a state of zero.
#pragma once

#include "common/hopper.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda_fwd/items.cuh"

namespace flashkda::chunk_kda_fwd {

// In place of the scan: the bounds of the chunks before a segment, one thread.
template <typename L>
__device__ void collect(const Arguments& arguments, uint32_t shared, Barriers barriers) {
  // What is left of a state 2^-24 times as large as before is below its fp32 rounding.
  constexpr float kForgotten = 5.9604644775390625e-8f;
  Cursor<L::kStages> cursor(0);
  float bounds[kProbedChunks] = {};
  for (;; cursor.advance(1)) {
    const uint32_t factors = shared + L::kFactors + cursor.stage * kFactorBytes;
    mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
    const uint4 where = load_shared<uint4>(factors + kChunkInfoOffset);
    const uint4 what = load_shared<uint4>(factors + kChunkInfoOffset + 16);
    const int left = int(what.x);
    if (left == kStop) return;
#pragma unroll
    for (int i = kProbedChunks - 1; i > 0; --i) bounds[i] = bounds[i - 1];
    bounds[0] = load_shared<float>(factors + kDecayOffset);
    mbarrier_arrive(barriers.empty(cursor.stage));
    if (left > kChunk) continue;
    // bounds[i] is the chunk i + 1 before the segment; those of fewer than kProbedChunks are 0 from the start or
    // another item's.
    const int segment = int(what.y);
    const int chunks = min(kProbedChunks, segment * arguments.segment_chunks);
    float product = 1.f;
    int warm_up = 0;
#pragma unroll
    for (int i = 0; i < kProbedChunks; ++i) {
      product *= bounds[i];
      if (warm_up == 0 && i < chunks && product <= kForgotten) warm_up = i + 1;
    }
    arguments.warm_ups[(int(where.w) * arguments.p.value_heads + int(where.z)) * arguments.segments + segment] =
        warm_up;
  }
}

}  // namespace flashkda::chunk_kda_fwd
