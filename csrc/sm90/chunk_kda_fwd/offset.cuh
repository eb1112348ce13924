// B of a segment's map (transition.cuh) in memory, in fp16. Its tiles of 16 channels are each divided by a power of two
// above their entries, so its error is 2^-12 of an entry, as that of R and of the state that R is multiplied with.
// Who reads it holds 16 rows of S' a warp: a warp's vector of a tile is what its threads hold of it, in order of lanes.
#pragma once

#include <cuda_runtime.h>

#include "common/elements.cuh"
#include "common/hopper.cuh"
#include "sm90/chunk_kda_fwd/config.h"

namespace flashkda::chunk_kda_fwd {

constexpr int kOffsetTiles = kHeadDim / 16;    // of channels
constexpr int kOffsetVectors = kHeadDim / 16;  // of V, to a tile

__host__ __device__ constexpr int offset_vector(int vector, int tile) { return (vector * kOffsetTiles + tile) * 512; }
__host__ __device__ constexpr int offset_scale(int tile) { return 2 * kHeadDim * kHeadDim + tile * 4; }
static_assert(offset_scale(kOffsetTiles) == kOffsetBytes);

// 2^-e for an x of [0, 2^e), but 2^59 at most: what is to be added to x is multiplied with it, too, and x may be zero.
__device__ __forceinline__ float inverse_power_above(float x) {
  const int exponent = min(max(__float_as_int(x) >> 23, 67), 251);
  return __int_as_float((253 - exponent) << 23);
}

__device__ __forceinline__ float inverse_power(float power) {
  return __int_as_float((254 << 23) - __float_as_int(power));
}

// Of a warp, whose threads hold 16 rows of B^T, the tile's, as those of a state (chunk_kda/state.cuh).
__device__ __forceinline__ void store_offset(const float (&offset)[2][32], char* to, int tile, int lane) {
  float largest = 0.f;
#pragma unroll
  for (int j = 0; j < 64; ++j) largest = fmaxf(largest, fabsf(offset[j / 32][j % 32]));
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  const float scale = inverse_power_above(largest);
  if (lane == 0) *reinterpret_cast<float*>(to + offset_scale(tile)) = inverse_power(scale);
#pragma unroll
  for (int vector = 0; vector < kOffsetVectors; ++vector) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 8 channels x 8 of V, there in rows of V
      const float* b = &offset[vector / 4][(vector % 4 * 2 + i % 2) * 4 + i / 2 * 2];
      x[i] = transpose_matrix(pack_fp16(b[0] * scale, b[1] * scale));
    }
    *reinterpret_cast<uint4*>(to + offset_vector(vector, tile) + lane * 16) = make_uint4(x[0], x[1], x[2], x[3]);
  }
}

// Of a warp, which holds that vector's rows of a state: B, each row times its scale.
__device__ __forceinline__ void load_offset(float (&state)[2][32], const char* from, int vector, int lane, float scale0,
                                            float scale1) {
#pragma unroll
  for (int tile = 0; tile < kOffsetTiles; ++tile) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from + offset_vector(vector, tile) + lane * 16);
    const float unscale = *reinterpret_cast<const float*>(from + offset_scale(tile));
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_fp16(words[i]);
      const float scale = unscale * (i % 2 ? scale1 : scale0);
      float* s = &state[tile / 4][(tile % 4 * 2 + i / 2) * 4 + i % 2 * 2];
      s[0] = pair.x * scale;
      s[1] = pair.y * scale;
    }
  }
}

}  // namespace flashkda::chunk_kda_fwd
