// B of a segment's map (transition.cuh) in memory, in fp16: each row of S', in each tile of 16 channels, divided by a
// power of two that brings its entries below 4. So its error is 2^-11 of an entry at most, as that of R and of the
// state that R is multiplied with. Who reads it holds 16 rows of S' a warp: a warp's vector of a tile is what its
// threads hold of it, in order of lanes.
#pragma once

#include <cuda_runtime.h>

#include "common/elements.cuh"
#include "common/hopper.cuh"
#include "sm90/chunk_kda_fwd/config.h"

namespace flashkda::chunk_kda_fwd {

constexpr int kOffsetTiles = kHeadDim / 16;    // of channels
constexpr int kOffsetVectors = kHeadDim / 16;  // of V, to a tile

__host__ __device__ constexpr int offset_vector(int vector, int tile) { return (vector * kOffsetTiles + tile) * 512; }
// 16 bytes of each lane that reads a vector: of each tile the upper 7 bits of the exponents of two rows' powers.
__host__ __device__ constexpr int offset_exponents(int vector) { return 2 * kHeadDim * kHeadDim + vector * 512; }
static_assert(offset_exponents(kOffsetVectors) == kOffsetBytes);

// The upper halves of two floats: their signs, exponents and 7 bits.
__device__ __forceinline__ uint32_t upper_halves(float low, float high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

// 2^(2 x - 127) for byte `at` x of a word, which is below 2^7.
__device__ __forceinline__ float power_of_byte(uint32_t word, int at) {
  return __uint_as_float(__byte_perm(word, 0, at << 12 | 0x444));
}

// Of a warp, whose threads hold 16 rows of B^T, the tile's, as those of a state (chunk_kda/state.cuh). Each block has
// this code once to do, which comes slowly: the least of it is the fastest.
__device__ __forceinline__ void store_offset(const float (&offset)[2][32], char* to, int tile, int lane) {
#pragma unroll
  for (int vector = 0; vector < kOffsetVectors; ++vector) {
    const float* b = &offset[vector / 4][vector % 4 * 8];
    const auto magnitude = [b](int i) { return fmaxf(fabsf(b[i]), fabsf(b[i + 2])); };
    uint32_t largest[2] = {upper_halves(magnitude(0), magnitude(4)), upper_halves(magnitude(1), magnitude(5))};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2)
        largest[i] = __vmaxu2(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], distance));
    }
    // The upper 7 bits of exponents, x: entries are below 2^(2 x - 125), and 4 at most times 2^(127 - 2 x).
    const uint32_t exponents = __byte_perm(largest[0], largest[1], 0x7531);
    uint32_t x[4];
#pragma unroll
    for (int half = 0; half < 2; ++half, b += 4) {
      const uint32_t inverse = 0x7f7f7f7f - exponents;
      const float scale[2] = {power_of_byte(inverse, half), power_of_byte(inverse, 2 + half)};
      // 8 channels x 8 of V, there in rows of V.
      x[half] = transpose_matrix(pack_fp16(b[0] * scale[0], b[1] * scale[1]));
      x[2 + half] = transpose_matrix(pack_fp16(b[2] * scale[0], b[3] * scale[1]));
    }
    // This lane's own rows are another's columns.
    const uint32_t own = __shfl_sync(0xffffffffu, exponents, lane / 8) >> lane / 4 % 2 * 16;
    *reinterpret_cast<uint16_t*>(to + offset_exponents(vector) + lane * 16 + tile * 2) = uint16_t(own);
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
    const uint32_t exponents = words_of_exponents[tile / 2];
    const float scales[2] = {power_of_byte(exponents, tile % 2 * 2) * scale0,
                             power_of_byte(exponents, tile % 2 * 2 + 1) * scale1};
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
