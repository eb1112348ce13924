// What a packed call works out on the device before its scan: cu_seqlens made safe, and the order of work.
#pragma once

#include <cuda_runtime.h>

#include "sm90/chunk_kda_fwd/config.h"

namespace flashkda::chunk_kda_fwd {

constexpr int kPlanThreads = 1024;
constexpr int kLengthClasses = 512;

// Classes of lengths, longest first: exact up to 16 chunks, then 16 to each doubling.
__device__ __forceinline__ int length_class(int length) {
  const int chunks = (length + kChunk - 1) / kChunk;
  const int exponent = chunks < 16 ? 0 : 27 - __clz(chunks);
  const int rank = exponent * 16 + (chunks >> exponent);
  return kLengthClasses - 1 - rank;
}

// One block. Offsets are clamped to [0, tokens] and made never to decrease, so that no sequence has a row outside the
// tensor or shares one; sequences are sorted by class (their order inside one depends on timing and moves no result).
template <typename Offset>
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const Offset* cu_seqlens, int sequences, int tokens, char* workspace) {
  __shared__ int warp_values[32];
  __shared__ int starts[kLengthClasses];
  cudaTriggerProgrammaticLaunchCompletion();
  const WorkspaceLayout layout = workspace_layout(sequences);
  int* offsets = reinterpret_cast<int*>(workspace + layout.offsets);
  int* order = reinterpret_cast<int*>(workspace + layout.order);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  if (thread == 0) *reinterpret_cast<int*>(workspace + layout.ticket) = 0;
  if (thread < kLengthClasses) starts[thread] = 0;

  // Running maximum.
  int carry = 0;
  for (int first = 0; first <= sequences; first += kPlanThreads) {
    const int i = first + thread;
    int x = 0;
    if (i <= sequences) {
      const Offset given = cu_seqlens[i];
      x = given < 0 ? 0 : given > tokens ? tokens : int(given);
    }
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, x, offset);
      if (lane >= offset) x = max(x, other);
    }
    if (lane == 31) warp_values[warp] = x;
    __syncthreads();
    for (int w = 0; w < warp; ++w) x = max(x, warp_values[w]);
    x = max(x, carry);
    for (int w = 0; w < 32; ++w) carry = max(carry, warp_values[w]);
    if (i <= sequences) offsets[i] = x;
    __syncthreads();
  }

  // Counting sort.
  for (int i = thread; i < sequences; i += kPlanThreads)
    atomicAdd(&starts[length_class(offsets[i + 1] - offsets[i])], 1);
  __syncthreads();
  if (warp == 0) {
    int count = 0;
    for (int i = 0; i < kLengthClasses / 32; ++i) count += starts[lane * (kLengthClasses / 32) + i];
    int before = count;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, offset);
      if (lane >= offset) before += other;
    }
    before -= count;
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

}  // namespace flashkda::chunk_kda_fwd
