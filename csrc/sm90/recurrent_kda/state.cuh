// A CTA's rows of V of a state, on their way between memory and registers. S[r] holds row r of a warp's, at the four
// channels of a lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/memory.cuh"
#include "sm90/recurrent_kda/config.h"

namespace flashkda::recurrent_kda {

// ---- kElements of a state in 32-bit words

template <typename State, int kElements>
struct Packed {
  static_assert(std::is_same_v<State, float> || std::is_same_v<State, __nv_bfloat16>);
  uint32_t words[kElements * sizeof(State) / 4];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<State, float>) {
      return __uint_as_float(words[i]);
    } else {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    }
  }

  template <typename F>  // of the index of an element
  __device__ __forceinline__ void fill(F element) {
#pragma unroll
    for (int i = 0; i < kElements; i += 4 / sizeof(State)) {
      if constexpr (std::is_same_v<State, float>) {
        words[i] = __float_as_uint(element(i));
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(element(i), element(i + 1));
        memcpy(&words[i / 2], &pair, sizeof(pair));
      }
    }
  }
};

__device__ __forceinline__ float channel_of(float4 x, int c) {
  return c == 0 ? x.x : c == 1 ? x.y : c == 2 ? x.z : x.w;
}

// To the values that a State holds.
template <typename State, int kRows>
__device__ __forceinline__ void round_to(float4 (&S)[kRows]) {
  if constexpr (!std::is_same_v<State, float>) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Packed<State, 4> x;
      x.fill([&](int c) { return channel_of(S[r], c); });
      S[r] = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
}

// ---- tiles: the rows of V that the kTileWarps warps of a CTA own, from row `row` of a value head
//
// load starts to read them from a row of the pool (or zeros), and wait hands them to the warps; store writes them. All
// warps of the CTA call these together. offset is that of a tile in a row of the pool.

template <typename State, bool kVFirst, int kRows, int kTileWarps>
class Tile;

// [V, K]: a warp's loads cover whole rows of the state, and nothing is shared.
template <typename State, int kRows, int kTileWarps>
class Tile<State, true, kRows, kTileWarps> {
 public:
  static constexpr int kSharedBytes = 0;

  __device__ __forceinline__ Tile(int warp, int lane, void*) : offset_(warp * kRows * kHeadDim + 4 * lane) {}

  __device__ __forceinline__ static int64_t offset(int value_head, int row) {
    return (int64_t(value_head) * kHeadDim + row) * kHeadDim;
  }

  __device__ __forceinline__ void load(const State* tile, bool is_zero) {
    const State* state = tile + offset_;
    keep(state);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (is_zero) {
#pragma unroll
        for (uint32_t& word : rows_[r].words) word = 0;
      } else {
        load_streaming(state + r * kHeadDim, rows_[r].words);
      }
    }
  }

  __device__ __forceinline__ void wait(float4 (&S)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) S[r] = make_float4(rows_[r][0], rows_[r][1], rows_[r][2], rows_[r][3]);
  }

  __device__ __forceinline__ void store(State* tile, const float4 (&S)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Packed<State, 4> x;
      x.fill([&](int c) { return channel_of(S[r], c); });
      store_streaming(tile + offset_ + r * kHeadDim, x.words);
    }
  }

 private:
  int offset_;
  Packed<State, 4> rows_[kRows];
};

// [K, V]: a warp's rows are a few neighbours in each of 128 lines. The CTA moves pieces of lines as wide as its own
// rows are, by way of shared memory, where the 16-byte chunks of a line change places so that the lanes of a warp,
// which want the same chunk of lines 4 apart, find them in different banks.
template <typename State, int kRows, int kTileWarps>
class Tile<State, false, kRows, kTileWarps> {
  static constexpr int kLineBytes = kTileWarps * kRows * sizeof(State);
  static constexpr int kChunks = kLineBytes / 16;  // in a line
  static constexpr int kCopies = kHeadDim * kChunks / (32 * kTileWarps);
  static_assert(kChunks >= 1 && (kChunks & (kChunks - 1)) == 0);

 public:
  static constexpr int kSharedBytes = kHeadDim * kLineBytes;

  __device__ __forceinline__ Tile(int warp, int lane, void* shared)
      : shared_(static_cast<char*>(shared)), warp_(warp), lane_(lane) {}

  __device__ __forceinline__ static int64_t offset(int value_head, int row) {
    return int64_t(value_head) * kHeadDim * kHeadDim + row;
  }

  __device__ __forceinline__ void load(const State* tile, bool is_zero) const {
    for_each_chunk(tile, [&](char* shared, const State* state) { copy_16_bytes_async(shared, state, is_zero); });
  }

  __device__ __forceinline__ void wait(float4 (&S)[kRows]) const {
    wait_for_copies();
    __syncthreads();
    Packed<State, kRows> x[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      access(c, [&](void* shared, int i, int bytes) { memcpy(&x[c].words[i], shared, bytes); });
#pragma unroll
    for (int r = 0; r < kRows; ++r) S[r] = make_float4(x[0][r], x[1][r], x[2][r], x[3][r]);
  }

  __device__ __forceinline__ void store(State* tile, const float4 (&S)[kRows]) const {
    __syncthreads();  // the last store has read what this one overwrites
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      Packed<State, kRows> x;
      x.fill([&](int r) { return channel_of(S[r], c); });
      access(c, [&](void* shared, int i, int bytes) { memcpy(shared, &x.words[i], bytes); });
    }
    __syncthreads();
    for_each_chunk(tile, [&](char* shared, State* state) {
      uint32_t words[4];
      memcpy(words, __builtin_assume_aligned(shared, 16), 16);
      store_streaming(state, words);
    });
  }

 private:
  __device__ __forceinline__ char* at(unsigned line, unsigned byte) const {
    const unsigned place = byte / 16 ^ line / 4 % (kChunks < 8 ? kChunks : 8);
    return shared_ + line * kLineBytes + place * 16 + byte % 16;
  }

  // f(in shared memory, in the state) for the chunks that a thread moves: neighbours from thread to thread, then some
  // lines on. Every 32 lines the chunks lie alike.
  template <typename Pointer, typename F>
  __device__ __forceinline__ void for_each_chunk(Pointer tile, F f) const {
    constexpr int kStep = kHeadDim / kCopies;  // lines
    static_assert(kStep % 16 == 0);
    const unsigned line = (warp_ * 32 + lane_) / kChunks, chunk = lane_ % kChunks;
    Pointer state = tile + line * kHeadDim + chunk * unsigned(16 / sizeof(State));
    keep(state);
    char* const shared[2] = {at(line, chunk * 16), at(line + kStep, chunk * 16)};
#pragma unroll
    for (int i = 0; i < kCopies; ++i) f(shared[i % 2] + i / 2 * (2 * kStep * kLineBytes), state + i * kStep * kHeadDim);
  }

  // f(address, first word, bytes) for the warp's rows of the lane's channel c, in pieces of at most a chunk.
  template <typename F>
  __device__ __forceinline__ void access(int c, F f) const {
    constexpr int kBytes = kRows * sizeof(State), kPiece = kBytes < 16 ? kBytes : 16;
#pragma unroll
    for (int i = 0; i < kBytes; i += kPiece) {
      f(__builtin_assume_aligned(at(4 * lane_ + c, warp_ * kBytes + i), kPiece), i / 4, kPiece);
    }
  }

  char* shared_;
  unsigned warp_, lane_;
};

}  // namespace flashkda::recurrent_kda
