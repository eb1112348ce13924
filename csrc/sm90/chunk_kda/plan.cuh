// What a packed call works out on the device before its scan: cu_seqlens made safe, and the order of work.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/warp.cuh"
#include "params.h"
#include "sm90/chunk_kda/config.h"

namespace flashkda::chunk_kda {

constexpr int kPlanThreads = 1024;
constexpr int kLengthClasses = 512;

// Classes of lengths, longest first: exact up to 16 chunks, then 16 to each doubling.
__device__ __forceinline__ int length_class(int length) {
  const int chunks = (length + kChunk - 1) / kChunk;
  const int exponent = chunks < 16 ? 0 : 27 - __clz(chunks);
  const int rank = exponent * 16 + (chunks >> exponent);
  return kLengthClasses - 1 - rank;
}

// An entry of cu_seqlens, within the tokens there are.
template <typename Offset>
__device__ __forceinline__ int clamped_offset(Offset given, int tokens) {
  return given < 0 ? 0 : given > tokens ? tokens : int(given);
}

// running[i] = op over value(0) .. value(i), for i < count. One block, which is in step afterwards. Values are not
// negative; 0 changes nothing.
template <typename Value, typename Op>
__device__ __forceinline__ void running_totals(int* running, int count, int (&warp_values)[32], Value value, Op op) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int carry = 0;
  for (int first = 0; first < count; first += kPlanThreads) {
    const int i = first + thread;
    int x = warp_running(i < count ? value(i) : 0, lane, op);
    if (lane == 31) warp_values[warp] = x;
    __syncthreads();
    for (int w = 0; w < warp; ++w) x = op(x, warp_values[w]);
    x = op(x, carry);
    for (int w = 0; w < 32; ++w) carry = op(carry, warp_values[w]);
    if (i < count) running[i] = x;
    __syncthreads();
  }
}

// One block. Offsets are clamped to [0, tokens] and made never to decrease, so that no sequence has a row outside the
// tensor or shares one; sequences are sorted by class (their order inside one depends on timing and moves no result).
// tile_offsets, [sequences + 1]: tiles of tile_tokens before each sequence, where it is not null.
template <typename Offset>
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const Offset* cu_seqlens, int sequences, int tokens,
                                                            char* workspace, int* tile_offsets, int tile_tokens) {
  __shared__ int warp_values[32];
  __shared__ int starts[kLengthClasses];
  cudaTriggerProgrammaticLaunchCompletion();
  const PlanLayout layout = plan_layout(sequences);
  int* offsets = reinterpret_cast<int*>(workspace + layout.offsets);
  int* order = reinterpret_cast<int*>(workspace + layout.order);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  if (thread == 0) *reinterpret_cast<int*>(workspace + layout.ticket) = 0;
  if (thread < kLengthClasses) starts[thread] = 0;

  const auto clamped = [&](int i) { return clamped_offset(cu_seqlens[i], tokens); };
  running_totals(offsets, sequences + 1, warp_values, clamped, [](int a, int b) { return max(a, b); });
  if (tile_offsets) {
    const auto tiles_before = [&](int i) {
      return i == 0 ? 0 : (offsets[i] - offsets[i - 1] + tile_tokens - 1) / tile_tokens;
    };
    running_totals(tile_offsets, sequences + 1, warp_values, tiles_before, [](int a, int b) { return a + b; });
  }

  // Counting sort.
  for (int i = thread; i < sequences; i += kPlanThreads)
    atomicAdd(&starts[length_class(offsets[i + 1] - offsets[i])], 1);
  __syncthreads();
  if (warp == 0) {
    int count = 0;
    for (int i = 0; i < kLengthClasses / 32; ++i) count += starts[lane * (kLengthClasses / 32) + i];
    int before = warp_running(count, lane, [](int a, int b) { return a + b; }) - count;
    for (int i = 0; i < kLengthClasses / 32; ++i) {
      int& start = starts[lane * (kLengthClasses / 32) + i];
      const int here = start;
      start = before;
      before += here;
    }
  }
  __syncthreads();
  for (int i = thread; i < sequences; i += kPlanThreads) {
    order[atomicAdd(&starts[length_class(offsets[i + 1] - offsets[i])], 1)] = i;
  }
}

inline cudaError_t launch_plan(const ChunkKdaParams& p, char* workspace, int* tile_offsets, int tile_tokens,
                               cudaStream_t stream) {
  if (p.cu_seqlens_is_64bit) {
    plan_kernel<<<1, kPlanThreads, 0, stream>>>(static_cast<const int64_t*>(p.cu_seqlens), p.sequences, int(p.tokens),
                                                workspace, tile_offsets, tile_tokens);
  } else {
    plan_kernel<<<1, kPlanThreads, 0, stream>>>(static_cast<const int32_t*>(p.cu_seqlens), p.sequences, int(p.tokens),
                                                workspace, tile_offsets, tile_tokens);
  }
  return cudaGetLastError();
}

}  // namespace flashkda::chunk_kda
