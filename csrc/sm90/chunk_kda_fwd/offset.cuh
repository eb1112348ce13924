// B of a segment's map (transition.cuh) in memory, in fp16: each row of S', in each tile of 16 channels, divided by a
// power of two above its entries. So its error is 2^-12 of an entry, as that of R and of the state that R is multiplied
// with. Who reads it holds 16 rows of S' a warp: a warp's vector of a tile is what its threads hold of it, in order of
// lanes.
#pragma once

#include <cuda_runtime.h>

#include "common/elements.cuh"
#include "common/hopper.cuh"
#include "sm90/chunk_kda_fwd/config.h"

namespace flashkda::chunk_kda_fwd {

constexpr int kOffsetTiles = kHeadDim / 16;    // of channels
constexpr int kOffsetVectors = kHeadDim / 16;  // of V, to a tile

__host__ __device__ constexpr int offset_vector(int vector, int tile) { return (vector * kOffsetTiles + tile) * 512; }
// 16 bytes of each lane that reads a vector: of each tile the exponents, as fp32 has them, of two of its rows' powers.
__host__ __device__ constexpr int offset_exponents(int vector) { return 2 * kHeadDim * kHeadDim + vector * 512; }
static_assert(offset_exponents(kOffsetVectors) == kOffsetBytes);

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
#pragma unroll
  for (int vector = 0; vector < kOffsetVectors; ++vector) {
    const float* b = &offset[vector / 4][vector % 4 * 8];
    uint32_t x[4];
    float scale[2][2];  // of halves of the vector's rows
#pragma unroll
    for (int half = 0; half < 2; ++half, b += 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = fmaxf(fabsf(b[i]), fabsf(b[2 + i]));
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
        scale[half][i] = inverse_power_above(largest);
      }
      // 8 channels x 8 of V, there in rows of V.
      x[half] = transpose_matrix(pack_fp16(b[0] * scale[half][0], b[1] * scale[half][1]));
      x[2 + half] = transpose_matrix(pack_fp16(b[2] * scale[half][0], b[3] * scale[half][1]));
    }
    // This lane's own rows are another's columns.
    uint32_t exponents = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) exponents |= (254 - (__float_as_int(scale[i % 2][i / 2]) >> 23)) << 8 * i;
    exponents = __shfl_sync(0xffffffffu, exponents, lane / 8) >> lane / 4 % 2 * 16;
    *reinterpret_cast<uint16_t*>(to + offset_exponents(vector) + lane * 16 + tile * 2) = uint16_t(exponents);
    *reinterpret_cast<uint4*>(to + offset_vector(vector, tile) + lane * 16) = make_uint4(x[0], x[1], x[2], x[3]);
  }
}

// Of a warp, which holds that vector's rows of a state: B, each row times its scale.
__device__ __forceinline__ void load_offset(float (&state)[2][32], const char* from, int vector, int lane, float scale0,
                                            float scale1) {
  const uint4 all = *reinterpret_cast<const uint4*>(from + offset_exponents(vector) + lane * 16);
  const uint32_t words_of_exponents[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
  for (int tile = 0; tile < kOffsetTiles; ++tile) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from + offset_vector(vector, tile) + lane * 16);
    const uint32_t exponents = words_of_exponents[tile / 2] >> tile % 2 * 16;
    const float scales[2] = {__int_as_float((exponents & 0xff) << 23) * scale0,
                             __int_as_float((exponents >> 8 & 0xff) << 23) * scale1};
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_fp16(words[i]);
      float* s = &state[tile / 4][(tile % 4 * 2 + i / 2) * 4 + i % 2 * 2];
      s[0] = pair.x * scales[i % 2];
      s[1] = pair.y * scales[i % 2];
    }
  }
}

}  // namespace flashkda::chunk_kda_fwd
