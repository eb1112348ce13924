// The state that enters a segment, from those before it:  S' = S R + B  for each on its way (transition.cuh).
#pragma once

#include <cuda_runtime.h>

#include "common/hopper.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda/state.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/items.cuh"
#include "sm90/chunk_kda_fwd/offset.cuh"

namespace flashkda::chunk_kda_fwd {

// Halves of R^T, of 64 rows each, on their way into shared memory; one buffer a half. Barriers of a half:
//   full   the first scan thread and the copy engine's bytes  -> the scan warps
//   empty  the scan warps, every lane                         -> the first scan thread
struct MapRing {
  static constexpr int kHalfBytes = kMapBytes / 2;
  uint32_t buffers;
  uint32_t barriers;
  uint32_t parities = 0;  // of how often each half was requested so far (bits 0, 1) and used (2, 3)

  __device__ MapRing(uint32_t buffers, uint32_t barriers) : buffers(buffers), barriers(barriers) {}

  __device__ uint32_t full(int half) const { return barriers + 16 * half; }
  __device__ uint32_t empty(int half) const { return barriers + 16 * half + 8; }

  // Of one thread, ahead of all else.
  __device__ void init(int scan_threads) const {
    for (int half = 0; half < 2; ++half) {
      mbarrier_init(full(half), 1);
      mbarrier_init(empty(half), scan_threads);
    }
  }

  // Of all scan threads.
  __device__ __forceinline__ void wait(int half) {
    mbarrier_wait(full(half), parities >> (2 + half) & 1);
    parities ^= 4 << half;
  }

  // The first scan thread's.
  __device__ __forceinline__ void request(const char* map, int half) {
    mbarrier_wait(empty(half), (parities >> half & 1) ^ 1);
    parities ^= 1 << half;
    mbarrier_arrive_expect_tx(full(half), kHalfBytes);
    cute::SM90_BULK_COPY_G2S::copy(map + half * kHalfBytes, shared_pointer<uint64_t>(full(half)),
                                   shared_pointer(buffers + half * kHalfBytes), kHalfBytes);
  }
};

// 2^-e for an x of [0, 2^e), but 2^59 at most: what is to be added to x is multiplied with it, too, and x may be zero.
__device__ __forceinline__ float inverse_power_above(float x) {
  const int exponent = min(max(__float_as_int(x) >> 23, 67), 251);
  return __int_as_float((253 - exponent) << 23);
}

__device__ __forceinline__ float inverse_power(float power) {
  return __int_as_float((254 << 23) - __float_as_int(power));
}

// The state that enters `segment`, which is not the first one. `column`: of V, this warp's first. S goes through in
// fp16, each row divided by a power of two above its entries: its error and R's are 2^-11 of an entry.
template <typename L>
__device__ __forceinline__ void enter_segment(float (&state)[2][32], uint32_t (&copy)[32], const Arguments& arguments,
                                              MapRing& ring, int64_t head, int segment, int column, int pair) {
  using cute::SM90::GMMA::Major;
  const ChunkKdaFwdParams& p = arguments.p;
  const SegmentArguments& from = arguments.segmented;
  const int lane = threadIdx.x % 32;
  const int64_t first = head * (from.segments - 1);
  const auto map = [&](int i) { return from.maps + (first + i) * kMapBytes; };
  const auto load_offset_of = [&](int i, float scale0, float scale1) {
    load_offset(state, from.offsets + (first + i) * kOffsetBytes, column / 16, lane, scale0, scale1);
  };
  // The last segment on the way that forgets what enters it. With fast gates that is the one before. Of others a half
  // may: a bit of `forgotten` each.
  static_assert(2 * kMaxSegments <= 64);
  uint64_t forgotten = 0;
  int last = segment - 1;
  for (; last >= 0; --last) {
    int2 status;
    while (true) {
      status = load_acquire_2(from.status + 2 * (first + last));
      if (status.x != kMapPending && status.y != kMapPending) break;
      __nanosleep(20);
    }
    const uint64_t halves = (status.x == kMapForgotten ? 1 : 0) | (status.y == kMapForgotten ? 2 : 0);
    if (halves == 3) break;
    forgotten |= halves << (2 * last);
  }
  const auto is_forgotten = [&](int i, int half) { return (forgotten >> (2 * i + half) & 1) != 0; };
  if (last == segment - 1) {
    load_offset_of(last, 1.f, 1.f);
    return;
  }
  fence_global_async();

  int i = max(last, 0);
  if (last < 0 && p.initial_state) {
    load_state(state,
               p.initial_state + head * (kHeadDim * kHeadDim) + first_element(p.state_v_first, column + lane / 4, pair),
               p.state_v_first);
  } else {
    load_offset_of(i++, 1.f, 1.f);
    if (i == segment) return;
  }
  const auto request = [&](int i, int half) {
    if (threadIdx.x == 0 && i < segment && !is_forgotten(i, half)) ring.request(map(i), half);
  };
  request(i, 0);
  request(i, 1);
#pragma unroll 1
  for (; i < segment; ++i) {
    float unscale[2];
    {
      float largest[2] = {}, scale[2];
#pragma unroll
      for (int j = 0; j < 64; ++j) largest[j / 2 % 2] = fmaxf(largest[j / 2 % 2], fabsf(state[j / 32][j % 32]));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2)
          largest[row] = fmaxf(largest[row], __shfl_xor_sync(0xffffffffu, largest[row], offset));
        scale[row] = inverse_power_above(largest[row]);
        unscale[row] = inverse_power(scale[row]);
      }
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        copy[j] = pack_fp16(state[j / 16][j % 16 * 2] * scale[j % 2], state[j / 16][j % 16 * 2 + 1] * scale[j % 2]);
      }
      __syncwarp();  // no load before the copy is made: there are no registers for both
      load_offset_of(i, scale[0], scale[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (is_forgotten(i, half)) {
        request(i + 1, half);
        continue;
      }
      ring.wait(half);
      const cute::GmmaDescriptor rows = swizzled_128b(ring.buffers + half * MapRing::kHalfBytes);
      cute::warpgroup_arrive();
#pragma unroll
      for (int m = 0; m < 8; ++m)
        wgmma_fp16<Major::K>(state[half], copy + 4 * m, moved(rows, m / 4 * 8192 + m % 4 * 32));
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      mbarrier_arrive(ring.empty(half));
      request(i + 1, half);
    }
#pragma unroll
    for (int j = 0; j < 64; ++j) state[j / 32][j % 32] *= unscale[j / 2 % 2];
  }
}

}  // namespace flashkda::chunk_kda_fwd
