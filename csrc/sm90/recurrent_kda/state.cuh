// A warp's rows of a state, in memory and in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/memory.cuh"
#include "sm90/recurrent_kda/config.h"

namespace flashkda::recurrent_kda {

// kRows rows of V at the 4 channels of a lane, as they lie in a state of [V, K] or of [K, V]: a few elements are
// contiguous, and every such run is kHeadDim elements behind the one before. In either layout a warp moves whole
// 32-byte sectors, as soon as a row of them is that long: 8 rows in fp32, and a CTA's rows of V fill them always.
template <typename State, bool kVFirst, int kRows>
struct StateBits {
  static_assert(std::is_same_v<State, float> || std::is_same_v<State, __nv_bfloat16>);
  static constexpr int kRuns = kVFirst ? kRows : 4;
  static constexpr int kRun = kVFirst ? 4 : kRows;

  uint32_t words[kRuns][kRun * sizeof(State) / 4];

  // Of the first element, in a row of the pool.
  __device__ __forceinline__ static int64_t offset(int value_head, int first_row, int channel) {
    const int row = kVFirst ? first_row : channel, column = kVFirst ? channel : first_row;
    return (int64_t(value_head) * kHeadDim + row) * kHeadDim + column;
  }

  // Zeros where there is nothing to load.
  __device__ __forceinline__ void load(const State* state, bool is_padding) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      if (is_padding) {
#pragma unroll
        for (uint32_t& word : words[i]) word = 0;
      } else {
        load_streaming(state + i * kHeadDim, words[i]);
      }
    }
  }

  __device__ __forceinline__ void store(State* state) const {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) store_streaming(state + i * kHeadDim, words[i]);
  }

  __device__ __forceinline__ void unpack(float4 (&S)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) S[r] = make_float4(element(r, 0), element(r, 1), element(r, 2), element(r, 3));
  }

  __device__ __forceinline__ void pack(const float4 (&S)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
#pragma unroll
      for (int j = 0; j < kRun; j += 4 / sizeof(State)) {
        const auto at = [&](int k) { return kVFirst ? channel_of(S[i], k) : channel_of(S[k], i); };
        if constexpr (std::is_same_v<State, float>) {
          words[i][j] = __float_as_uint(at(j));
        } else {
          const __nv_bfloat162 pair = __floats2bfloat162_rn(at(j), at(j + 1));
          memcpy(&words[i][j / 2], &pair, sizeof(pair));
        }
      }
    }
  }

 private:
  __device__ __forceinline__ static float channel_of(float4 x, int c) {
    return c == 0 ? x.x : c == 1 ? x.y : c == 2 ? x.z : x.w;
  }

  __device__ __forceinline__ float element(int row, int channel) const {
    const int i = kVFirst ? row : channel, j = kVFirst ? channel : row;
    if constexpr (std::is_same_v<State, float>) {
      return __uint_as_float(words[i][j]);
    } else {
      const uint32_t pair = words[i][j / 2];
      return __uint_as_float(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    }
  }
};

}  // namespace flashkda::recurrent_kda
