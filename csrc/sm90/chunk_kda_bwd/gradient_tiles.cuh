// What surrounds the math of gradients.cuh: shared memory, barriers, which tile is next, and the warps that load tiles,
// invert small blocks and sum over states beside it.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>

#include "common/elements.cuh"
#include "common/hopper.cuh"
#include "common/math.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda_bwd/config.h"

namespace flashkda::chunk_kda_bwd {

constexpr int kMathThreads = 256;
constexpr int kGradientThreads = kMathThreads + 128;
constexpr int kMathRegisters = 232;
constexpr int kHelperRegisters = 40;  // 256 x 232 + 128 x 40 is what 384 x 168 were

// Operands are [64 tokens][64 channels] of 16 bits, two for a head, in the 128-byte swizzle.
constexpr int kHalfBytes = 8192;
constexpr int kTensorBytes = 2 * kHalfBytes;
constexpr int kBlockBytes = 2048;  // 16 tokens of a half
constexpr int kBlocks = 4;

template <typename G>
struct GradientLayout {
  static constexpr bool kWideGate = sizeof(G) == 4;
  static constexpr int kStates = 0;
  static constexpr int kStateGradients = kStates + kStateBytes;
  static constexpr int kQuery = kStateGradients + kStateBytes;
  static constexpr int kKey = kQuery + kTensorBytes;
  static constexpr int kValue = kKey + kTensorBytes;                // v, then U
  static constexpr int kWork = kValue + kTensorBytes;               // g, then operands, then gradients on their way out
  static constexpr int kOutputGradient = kWork + 2 * kTensorBytes;  // work as well, before dO and after it
  static constexpr int kDecays = kOutputGradient + kTensorBytes;    // G, fp32 [4][2][256 threads][4]
  static constexpr int kScores = kDecays + 2 * kTensorBytes;        // bf16 [64][64] of 128 bytes, swizzled: P, then dP
  static constexpr int kSystem = kScores + kHalfBytes;  // -L in two terms (see above), inverses less I; then dN
  static constexpr int kSolve = kSystem + kHalfBytes;   // fp32 [4][kSolveStride]: diagonal blocks of L
  static constexpr int kSolveStride = 1088;             // bytes, 16 banks apart
  static constexpr int kSums = kSolve;                  // fp32 [3][8 warps][64], later: q dq, k dk, Y W
  static constexpr int kReferences = kSums + 3 * 8 * 4 * kTile;      // fp32 [8][128]: G after every eighth token
  static constexpr int kKeyFactor = kReferences + 8 * 4 * kHeadDim;  // fp32 [64]: what k is times the operands' k
  static constexpr int kQueryFactor = kKeyFactor + 4 * kTile;        // fp32 [64]
  static constexpr int kKeyUnit = kQueryFactor + 4 * kTile;   // fp32 [64]: the operands' k in terms of k as it came
  static constexpr int kQueryUnit = kKeyUnit + 4 * kTile;     // fp32 [64]
  static constexpr int kBeta = kQueryUnit + 4 * kTile;        // fp32 [3][64], a tile each in turn
  static constexpr int kBetaSlots = kBeta + 3 * 4 * kTile;    // fp32 [4][64]: rowsum(dL * N), by level and column
  static constexpr int kTotals = kBetaSlots + 4 * 4 * kTile;  // fp32 [2][64]: what of q and k leaves dq and dk
  static constexpr int kStateSums = kTotals + 2 * 4 * kTile;  // fp32 [2][128]: colsum(dS' * S)
  static constexpr int kRateSums = kStateSums + 2 * 4 * kHeadDim;  // fp32 [8]: A_log's, by warp
  static constexpr int kInfo = kRateSums + 32;                     // [2] of 16 bytes
  static constexpr int kBarriers = kInfo + 32;
  static constexpr int kBytes = kBarriers + 88 + 1024;  // 1024 to align the base
  static_assert(kBlocks * kSolveStride <= kReferences - kSums);
  static_assert(kBytes <= 232448);
};

// Barriers, with who arrives and who waits:
//   full_keys      the loader's thread and TMA's bytes (q, k)          -> math warps
//   full_gates     the loader's thread and TMA's bytes (g), the state
//                  sum's warp (beta)                                   -> math warps, the state sum's warp
//   full_states    the loader's thread and TMA's bytes (S, dS', v)     -> math warps, the state sum's warp
//   full_output    the loader's thread and TMA's bytes (dO)            -> math warps
//   free_keys      math warps: the tile's info has been read, too      -> loader
//   free_gates     each math warp: g's place is work until then        -> loader
//   free_states    math's thread 0, behind a barrier of all math
//                  warps, the state sum's warp                         -> loader
//   free_output    math's thread 0, behind a barrier of all math
//                  warps: dO's place has been work until then          -> loader
//   system_ready   math warps: diagonal blocks of L are written        -> the solving warps
//   inverse_ready  the solving warps: their inverses are written       -> math warps
//   sums_ready     the state sum's warp: its sums are written          -> math warps
//
// Where a warp arrives for what it has read or written by ordinary loads and stores, each of its lanes does: race
// detectors follow that, but not one lane behind a barrier.
struct GradientBarriers {
  uint32_t base;
  __device__ uint32_t full_keys() const { return base; }
  __device__ uint32_t full_gates() const { return base + 8; }
  __device__ uint32_t full_states() const { return base + 16; }
  __device__ uint32_t full_output() const { return base + 24; }
  __device__ uint32_t free_keys() const { return base + 32; }
  __device__ uint32_t free_gates() const { return base + 40; }
  __device__ uint32_t free_states() const { return base + 48; }
  __device__ uint32_t free_output() const { return base + 56; }
  __device__ uint32_t system_ready() const { return base + 64; }
  __device__ uint32_t inverse_ready() const { return base + 72; }
  __device__ uint32_t sums_ready() const { return base + 80; }
};

constexpr uint32_t kMath = 1;  // the named barrier of all math warps

struct GradientArguments {
  CUtensorMap q, k, v, g, d_o;
  ChunkKdaBwdParams p;
  int64_t tiles_per_sequence;
  TileOrder order;
  WorkspaceLayout layout;
};

// ---- items

struct TileInfo {
  int token;  // first token, in its row of the batch
  int batch;
  int valid;  // tokens of the tile that are the sequence's
  int image;  // tile * value_heads + value head
};

__device__ __forceinline__ int64_t tiles_in_use(const GradientArguments& a) {
  const ChunkKdaBwdParams& p = a.p;
  if (!p.cu_seqlens) return a.tiles_per_sequence * p.sequences;
  return reinterpret_cast<const int*>(static_cast<const char*>(p.workspace) + a.layout.tile_offsets)[p.sequences];
}

// Each role of a block goes through its tiles.
__device__ __forceinline__ TileWalk walk_tiles(const GradientArguments& a) {
  return a.order.walk(blockIdx.x, gridDim.x, int(tiles_in_use(a)) * a.p.value_heads);
}

__device__ __forceinline__ int image_at(const GradientArguments& a, const TileWalk& walk) {
  return a.order.image(walk.position, int(a.tiles_per_sequence), a.p.sequences, a.p.value_heads);
}

__device__ __forceinline__ TileInfo read_tile(const GradientArguments& a, int image) {
  const ChunkKdaBwdParams& p = a.p;
  const int tile = image / p.value_heads;
  TileInfo info;
  info.image = image;
  if (!p.cu_seqlens) {
    info.batch = tile / int(a.tiles_per_sequence);
    info.token = (tile - info.batch * int(a.tiles_per_sequence)) * kTile;
    info.valid = min(kTile, int(p.tokens) - info.token);
    return info;
  }
  const char* workspace = static_cast<const char*>(p.workspace);
  const int* tiles = reinterpret_cast<const int*>(workspace + a.layout.tile_offsets);
  const int* offsets = chunk_kda::packed_offsets(workspace + a.layout.plan, p.sequences);
  // The last sequence whose tiles begin at this one or before: the one after it begins later, so it has tiles.
  int low = 0, high = p.sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (tiles[middle] <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  info.batch = 0;
  info.token = offsets[low] + (tile - tiles[low]) * kTile;
  info.valid = min(kTile, offsets[low + 1] - info.token);
  return info;
}

// ---- loader

__device__ __forceinline__ void prefetch(const CUtensorMap* map, int channel, int head, const TileInfo& info) {
  cute::SM90_TMA_LOAD_4D::PREFETCH::copy(map, channel, info.token, head, info.batch);
}

template <typename G>
__device__ void load_tiles(const GradientArguments& a, uint32_t shared, uint8_t* base, GradientBarriers barriers) {
  using L = GradientLayout<G>;
  const ChunkKdaBwdParams& p = a.p;
  const int group = p.value_heads / p.heads;
  char* const workspace = static_cast<char*>(p.workspace);
  uint32_t parity = 0;
  int slot = 0;
  for (TileWalk walk = walk_tiles(a); walk.is_left(); walk.advance(), parity ^= 1, slot ^= 1) {
    const int image = image_at(a, walk);
    const TileInfo info = read_tile(a, image);
    const int value_head = image % p.value_heads, head = value_head / group;
    const auto load = [&](uint32_t destination, const CUtensorMap* map, uint32_t barrier, int of_head) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        tma_load_4d(destination + half * kHalfBytes, map, barrier, half * 64, info.token, of_head, info.batch);
      }
    };
    mbarrier_wait(barriers.free_states(), parity ^ 1);
    mbarrier_arrive_expect_tx(barriers.full_states(), 2 * kStateBytes + kTensorBytes);
    const size_t state = size_t(image) * kStateBytes;
    const auto load_image = [&](size_t offset, uint32_t destination) {
      cute::SM90_BULK_COPY_G2S::copy(workspace + offset + state, shared_pointer<uint64_t>(barriers.full_states()),
                                     shared_pointer(destination), kStateBytes);
    };
    if (a.order.early_blocks == 0) load_image(a.layout.states, shared + L::kStates);
    load(shared + L::kValue, &a.v, barriers.full_states(), value_head);
    // What comes next has no place yet, but may come as far as L2.
    for (int part = 0; part < 2; ++part) {
      prefetch(&a.k, part * 64, head, info);
      prefetch(&a.q, part * 64, head, info);
    }
    for (int part = 0; part < (L::kWideGate ? 4 : 2); ++part)
      prefetch(&a.g, part * (L::kWideGate ? 32 : 64), value_head, info);
    if (a.order.early_blocks > 0) {
      int* const arrivals = reinterpret_cast<int*>(workspace + a.layout.arrivals) + int64_t(image) * kArrivals;
      for (int pair = 0; pair < kArrivals; pair += 2) {
        for (int2 there = load_acquire_2(arrivals + pair); !(there.x && there.y);
             there = load_acquire_2(arrivals + pair))
          __nanosleep(200);
      }
      fence_global_async();
      load_image(a.layout.states, shared + L::kStates);
    }
    load_image(a.layout.state_gradients, shared + L::kStateGradients);

    mbarrier_wait(barriers.free_keys(), parity ^ 1);
    *reinterpret_cast<TileInfo*>(base + L::kInfo + slot * sizeof(TileInfo)) = info;
    mbarrier_arrive_expect_tx(barriers.full_keys(), 2 * kTensorBytes);
    load(shared + L::kKey, &a.k, barriers.full_keys(), head);
    load(shared + L::kQuery, &a.q, barriers.full_keys(), head);

    mbarrier_wait(barriers.free_gates(), parity ^ 1);
    mbarrier_arrive_expect_tx(barriers.full_gates(), (L::kWideGate ? 2 : 1) * kTensorBytes);
#pragma unroll
    for (int part = 0; part < (L::kWideGate ? 4 : 2); ++part) {
      tma_load_4d(shared + L::kWork + part * kHalfBytes, &a.g, barriers.full_gates(), part * (L::kWideGate ? 32 : 64),
                  info.token, value_head, info.batch);
    }

    mbarrier_wait(barriers.free_output(), parity);
    mbarrier_arrive_expect_tx(barriers.full_output(), kTensorBytes);
    load(shared + L::kOutputGradient, &a.d_o, barriers.full_output(), value_head);
  }
  if (a.order.early_blocks > 0) cudaGridDependencySynchronize();  // who waits for the gradients waits for the scans
}

// ---- helpers: the small inverses, and the sums over states

// (I + L)^-1 - I of two diagonal blocks (I needs no rounding): lane t % 16 solves X (I + L) = I for row t, in fp32.
template <typename G>
__device__ void invert_blocks(const GradientArguments& a, uint32_t shared, GradientBarriers barriers, int warp) {
  using L = GradientLayout<G>;
  const int lane = threadIdx.x % 32, row = lane % 16, block = warp * 2 + lane / 16;
  const uint32_t system = shared + L::kSolve + block * L::kSolveStride;
  uint32_t parity = 0;
  for (TileWalk walk = walk_tiles(a); walk.is_left(); walk.advance(), parity ^= 1) {
    mbarrier_wait(barriers.system_ready(), parity);
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = i == row ? 1.f : 0.f;
#pragma unroll
    for (int s = 15; s > 0; --s) {
#pragma unroll
      for (int i = 0; i < (s + 3) / 4; ++i) {
        const float4 v = load_shared<float4>(system + s * 64 + i * 16);
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (4 * i + j < s) x[4 * i + j] = fmaf(-x[s], values[j], x[4 * i + j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = i == row ? 0.f : x[i];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 packed;
      packed.x = pack_bf16(x[8 * half], x[8 * half + 1]);
      packed.y = pack_bf16(x[8 * half + 2], x[8 * half + 3]);
      packed.z = pack_bf16(x[8 * half + 4], x[8 * half + 5]);
      packed.w = pack_bf16(x[8 * half + 6], x[8 * half + 7]);
      store_shared(
          shared + L::kSystem + block * kBlockBytes + row * 128 + ((uint32_t(block * 2 + half) ^ (row % 8)) << 4),
          packed);
    }
    mbarrier_arrive(barriers.inverse_ready());
  }
}

// beta, and colsum(dS' * S): lane c % 16 has channels 8 c to 8 c + 7, half the rows.
template <typename G>
__device__ void sum_states(const GradientArguments& a, uint32_t shared, GradientBarriers barriers) {
  using L = GradientLayout<G>;
  const int lane = threadIdx.x % 32, chunk = lane % 16, odd = lane / 16;
  uint32_t parity = 0;
  int slot = 0, image_count = 0;
  for (TileWalk walk = walk_tiles(a); walk.is_left(); walk.advance(), parity ^= 1, slot ^= 1, ++image_count) {
    const ChunkKdaBwdParams& p = a.p;
    const int image = image_at(a, walk);
    const TileInfo info = read_tile(a, image);
    for (int token = lane; token < kTile; token += 32) {
      float beta = 0.f;
      if (token < info.valid) {
        beta =
            load_element(p.beta,
                         int64_t(info.batch) * p.beta_stride.batch + int64_t(info.token + token) * p.beta_stride.token +
                             image % p.value_heads * p.beta_stride.head,
                         p.beta_dtype);
        if (p.beta_sigmoid) beta = sigmoid(beta);
        beta *= p.beta_factor;
      }
      // Of three places this is free: the tile that had it is over when the states of the one before this have come.
      store_shared(shared + L::kBeta + (image_count % 3 * kTile + token) * 4, beta);
    }
    mbarrier_arrive(barriers.full_gates());
    mbarrier_wait(barriers.full_states(), parity);
    float sum[8] = {};
#pragma unroll 4
    for (int i = 0; i < kHeadDim / 2; ++i) {
      const int row = 2 * i + odd;
      const uint32_t address =
          shared + L::kStates + chunk / 8 * (kStateBytes / 2) + row * 128 + ((uint32_t(chunk % 8) ^ (row % 8)) << 4);
      const uint4 x = load_shared<uint4>(address);
      const uint4 y = load_shared<uint4>(address + L::kStateGradients - L::kStates);
      const uint32_t s[4] = {x.x, x.y, x.z, x.w}, d[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[2 * c] = fmaf(__uint_as_float(s[c] << 16), __uint_as_float(d[c] << 16), sum[2 * c]);
        sum[2 * c + 1] = fmaf(__uint_as_float(s[c] & 0xffff0000u), __uint_as_float(d[c] & 0xffff0000u), sum[2 * c + 1]);
      }
    }
    mbarrier_arrive(barriers.free_states());
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], 16);
    if (odd == 0) {
      const uint32_t address = shared + L::kStateSums + slot * 4 * kHeadDim + chunk * 32;
      store_shared(address, make_float4(sum[0], sum[1], sum[2], sum[3]));
      store_shared(address + 16, make_float4(sum[4], sum[5], sum[6], sum[7]));
    }
    mbarrier_arrive(barriers.sums_ready());
    mbarrier_wait(barriers.full_gates(), parity);  // or the next arrival might count for this tile
  }
}

}  // namespace flashkda::chunk_kda_bwd
