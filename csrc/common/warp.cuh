#pragma once

#include <cuda_runtime.h>

namespace flashkda {

constexpr unsigned kFullWarp = 0xffffffffu;

// The reductions add lanes in one tree, offsets 16, 8, 4, 2, 1, and fp32 addition commutes: a sum has the same bits in
// every lane, and however many values are reduced together.

// Three at a time, since shuffles keep the order of the source and each takes over 20 cycles to answer.
__device__ __forceinline__ float3 warp_sum(float3 x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x.x += __shfl_xor_sync(kFullWarp, x.x, offset);
    x.y += __shfl_xor_sync(kFullWarp, x.y, offset);
    x.z += __shfl_xor_sync(kFullWarp, x.z, offset);
  }
  return x;
}

// op over the lanes up to one's own.
template <typename Op>
__device__ __forceinline__ int warp_running(int x, int lane, Op op) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kFullWarp, x, offset);
    if (lane >= offset) x = op(x, other);
  }
  return x;
}

// Sums kValues (a power of two, at most 32) values over the warp. Instead of five shuffles a value, each step halves
// the values a lane is responsible for: kValues - 1 shuffles for the first log2(kValues) steps, then one a step. Lane l
// returns the total of value l / (32 / kValues).
template <int kValues, int kOffset = 16>
__device__ __forceinline__ float warp_sums(float (&x)[kValues], int lane) {
  static_assert((kValues & (kValues - 1)) == 0 && kValues <= 2 * kOffset);
  if constexpr (kValues == 1) {
    float sum = x[0];
#pragma unroll
    for (int offset = kOffset; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    return sum;
  } else {
    const bool upper = lane & kOffset;
    float half[kValues / 2];
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      const float mine = upper ? x[i + kValues / 2] : x[i];
      const float theirs = upper ? x[i] : x[i + kValues / 2];
      half[i] = mine + __shfl_xor_sync(kFullWarp, theirs, kOffset);
    }
    return warp_sums<kValues / 2, kOffset / 2>(half, lane);
  }
}

}  // namespace flashkda
