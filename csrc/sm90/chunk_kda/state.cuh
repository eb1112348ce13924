// A state in a scan thread's registers. The thread holds rows `row` and `row + 8` of its warp's 16, columns 8 j + pair
// and + 1: element 4 j + 2 i + e is row + 8 i, pair + e of column block j. Rows of V are rows of the scan's products
// and tokens their columns, so that the state is in accumulators whose bf16 copy is already an A operand.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "common/hopper.cuh"
#include "sm90/chunk_kda/pipeline.cuh"

namespace flashkda::chunk_kda {

__device__ __forceinline__ float2 load_pair(const float* x) { return *reinterpret_cast<const float2*>(x); }
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* x) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x));
}

__device__ __forceinline__ void store_pair(float* x, float low, float high) {
  *reinterpret_cast<float2*>(x) = make_float2(low, high);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* x, float low, float high) {
  *reinterpret_cast<__nv_bfloat162*>(x) = __floats2bfloat162_rn(low, high);
}

// Of a matrix in memory, the element that this thread holds first.
__device__ __forceinline__ int first_element(bool v_first, int row, int pair) {
  return v_first ? row * kHeadDim + pair : pair * kHeadDim + row;
}

// From and to memory, `first` being the address of the thread's first element. State: float or __nv_bfloat16. Not
// through the read-only path: a kernel may write the same matrix later.
template <typename State>
__device__ __forceinline__ void load_state(float (&state)[2][32], const State* first, bool v_first) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* s = &state[j / 8][j % 8 * 4 + 2 * i];
      if (v_first) {
        const float2 x = load_pair(first + (8 * i * kHeadDim + 8 * j));
        s[0] = x.x;
        s[1] = x.y;
      } else {
        s[0] = float(first[8 * j * kHeadDim + 8 * i]);
        s[1] = float(first[(8 * j + 1) * kHeadDim + 8 * i]);
      }
    }
  }
}

template <typename State>
__device__ __forceinline__ void store_state(const float (&state)[2][32], State* first, bool v_first) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* s = &state[j / 8][j % 8 * 4 + 2 * i];
      if (v_first) {
        store_pair(first + (8 * i * kHeadDim + 8 * j), s[0], s[1]);
      } else {
        first[8 * j * kHeadDim + 8 * i] = State(s[0]);
        first[(8 * j + 1) * kHeadDim + 8 * i] = State(s[1]);
      }
    }
  }
}

// The decays of a half of K, from `address` for this thread's pair.
__device__ __forceinline__ void load_decays(float4 (&d)[4], uint32_t address, int half) {
#pragma unroll
  for (int m = 0; m < 4; ++m) d[m] = load_shared<float4>(address + half * 256 + m * 64);
}

// The bf16 copy of half of K that the next chunk multiplies with, and that chunk's decay. Both are done as soon as the
// half is known and its chunk ready, beside the products of the other half.
__device__ __forceinline__ void copy_and_decay(float (&state)[2][32], uint32_t (&copy)[32], int half,
                                               const float4 (&d)[4]) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    float* s = &state[half][8 * m];
#pragma unroll
    for (int i = 0; i < 4; ++i) copy[16 * half + 4 * m + i] = pack_bf16(s[2 * i], s[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      s[2 * i] *= d[m].x;
      s[2 * i + 1] *= d[m].y;
      s[4 + 2 * i] *= d[m].z;
      s[4 + 2 * i + 1] *= d[m].w;
    }
  }
}

// The same for all of K, ahead of a chunk that no other comes before.
__device__ __forceinline__ void copy_and_decay(float (&state)[2][32], uint32_t (&copy)[32], uint32_t decays) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float4 d[4];
    load_decays(d, decays, half);
    copy_and_decay(state, copy, half, d);
  }
}

// The products of that copy with rows of 128 channels, whose second halves lie `half_bytes` on.
template <int kCount>
__device__ __forceinline__ void multiply_copy(float (&d)[kCount], const uint32_t (&copy)[32], cute::GmmaDescriptor rows,
                                              int half_bytes, cute::SM90::GMMA::ScaleOut first) {
  using cute::SM90::GMMA::ScaleOut;
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    wgmma<cute::SM90::GMMA::Major::K>(d, copy + 4 * m, moved(rows, m / 4 * half_bytes + m % 4 * 32),
                                      m == 0 ? first : ScaleOut::One);
  }
}

}  // namespace flashkda::chunk_kda
