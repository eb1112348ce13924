// What is left after the tiles: sums over tiles and over grouped value heads, always in the same order, and the rows
// that no sequence has.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/memory.cuh"
#include "common/warp.cuh"
#include "params.h"
#include "sm90/chunk_kda_bwd/config.h"

namespace flashkda::chunk_kda_bwd {

constexpr int kSumParts = 4;  // of the channels of a value head, a block each
constexpr int kSumThreads = 512;
constexpr int kSumWarps = kSumThreads / 32;
constexpr int kRowsThreads = 256;
constexpr int kRowsBlocksPerSm = 4;
constexpr int kPieces = kHeadDim / 8;  // of 16 bytes, in the row of a head with 16-bit elements

struct ReduceArguments {
  ChunkKdaBwdParams p;
  Plan plan;
};

template <typename T>
__device__ __forceinline__ const T* in_workspace(const ReduceArguments& arguments, size_t offset) {
  return reinterpret_cast<const T*>(static_cast<const char*>(arguments.p.workspace) + offset);
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Gradients of A_log and dt_bias: a block sums a part of the channels of one value head over all tiles, and the first
// part's block sums A_log. No block waits for another one, so the sums end on a single multiprocessor, too. A lane
// reads 4 channels, kLanesOfTile lanes a tile; lanes, then warps are added in a fixed order.
__global__ void __launch_bounds__(kSumThreads) gate_sums_kernel(const __grid_constant__ ReduceArguments arguments) {
  constexpr int kLanesOfTile = kHeadDim / kSumParts / 4;
  constexpr int kTilesAtOnce = kSumThreads / kLanesOfTile;
  __shared__ float4 warp_bias[kSumWarps][kLanesOfTile];
  __shared__ float warp_A_log[kSumWarps];
  const ChunkKdaBwdParams& p = arguments.p;
  const WorkspaceLayout& layout = arguments.plan.workspace;
  const int part = blockIdx.x % kSumParts, head = blockIdx.x / kSumParts;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int tiles =
      p.cu_seqlens ? in_workspace<int32_t>(arguments, layout.tile_offsets)[p.sequences] : int(arguments.plan.tiles);
  const int channels = part * kLanesOfTile + thread % kLanesOfTile;  // in fours
  const bool sums_A_log = p.dA_log && part == 0;

  float4 bias = make_float4(0, 0, 0, 0);
  float A_log = 0;
  if (p.d_dt_bias) {
    const float4* partials = in_workspace<float4>(arguments, layout.bias_partials);
#pragma unroll 4
    for (int tile = thread / kLanesOfTile; tile < tiles; tile += kTilesAtOnce)
      bias = bias + partials[(int64_t(tile) * p.value_heads + head) * (kHeadDim / 4) + channels];
  }
  if (sums_A_log) {
    const float* partials = in_workspace<float>(arguments, layout.A_log_partials);
    for (int tile = thread; tile < tiles; tile += kSumThreads) A_log += partials[int64_t(tile) * p.value_heads + head];
  }
#pragma unroll
  for (int distance = 16; distance >= kLanesOfTile; distance /= 2) {
    bias =
        bias + make_float4(__shfl_xor_sync(kFullWarp, bias.x, distance), __shfl_xor_sync(kFullWarp, bias.y, distance),
                           __shfl_xor_sync(kFullWarp, bias.z, distance), __shfl_xor_sync(kFullWarp, bias.w, distance));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) A_log += __shfl_xor_sync(kFullWarp, A_log, distance);
  if (lane < kLanesOfTile) warp_bias[warp][lane] = bias;
  if (lane == 0) warp_A_log[warp] = A_log;
  __syncthreads();
  if (thread < kLanesOfTile && p.d_dt_bias) {
    for (int w = 1; w < kSumWarps; ++w) bias = bias + warp_bias[w][thread];
    reinterpret_cast<float4*>(p.d_dt_bias)[head * (kHeadDim / 4) + channels] = bias;
  }
  if (thread == 0 && sums_A_log) {
    for (int w = 1; w < kSumWarps; ++w) A_log += warp_A_log[w];
    p.dA_log[head] = A_log;
  }
}

// Rows of a gradient that are in no sequence: those before begin and from end on. A row is `pieces` Pieces.
template <typename Piece>
__device__ __forceinline__ void clear_outside(void* gradient, int64_t pieces, int64_t begin, int64_t end,
                                              int64_t tokens) {
  if (!gradient) return;
  Piece* const rows = static_cast<Piece*>(gradient);
  const int64_t start = int64_t(blockIdx.x) * kRowsThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kRowsThreads;
  for (int64_t i = start; i < begin * pieces; i += step) rows[i] = Piece{};
  for (int64_t i = end * pieces + start; i < tokens * pieces; i += step) rows[i] = Piece{};
}

// Sums of the value heads that share a head of q and k, 8 channels a thread. Rows in no sequence are zero.
template <typename T>
__device__ __forceinline__ void sum_groups(const ChunkKdaBwdParams& p, void* gradient, const float4* per_value_head,
                                           int64_t begin, int64_t end) {
  using T2 = typename Packed2<T>::type;
  if (!gradient) return;
  const int group = p.value_heads / p.heads;
  const int64_t count = int64_t(p.batch) * p.tokens * p.heads * kPieces;
  const int64_t step = int64_t(gridDim.x) * kRowsThreads;
  for (int64_t i = int64_t(blockIdx.x) * kRowsThreads + threadIdx.x; i < count; i += step) {
    const int64_t head = i / kPieces, row = head / p.heads;
    float4 low = make_float4(0, 0, 0, 0), high = low;
    if (row >= begin && row < end) {
      const float4* from = per_value_head + head * group * (2 * kPieces) + i % kPieces * 2;
      for (int member = 0; member < group; ++member, from += 2 * kPieces) {
        low = low + from[0];
        high = high + from[1];
      }
    }
    const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    T2 packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) packed[j] = T2{from_float<T>(x[2 * j]), from_float<T>(x[2 * j + 1])};
    uint4 bits;
    memcpy(&bits, packed, sizeof(bits));
    static_cast<uint4*>(gradient)[i] = bits;
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowsThreads) rows_kernel(const __grid_constant__ ReduceArguments arguments) {
  const ChunkKdaBwdParams& p = arguments.p;
  const WorkspaceLayout& layout = arguments.plan.workspace;
  int64_t begin = 0, end = int64_t(p.batch) * p.tokens;
  if (p.cu_seqlens) {
    const int* offsets = in_workspace<int32_t>(arguments, layout.plan + chunk_kda::plan_layout(p.sequences).offsets);
    begin = offsets[0];
    end = offsets[p.sequences];
    if (p.heads == p.value_heads) {
      clear_outside<uint4>(p.dq, int64_t(p.heads) * kPieces, begin, end, p.tokens);
      clear_outside<uint4>(p.dk, int64_t(p.heads) * kPieces, begin, end, p.tokens);
    }
    const int64_t g_pieces = int64_t(p.value_heads) * kPieces * (p.g_dtype == Dtype::kFloat32 ? 2 : 1);
    const int64_t beta_pieces = int64_t(p.value_heads) * (p.beta_dtype == Dtype::kFloat32 ? 2 : 1);
    clear_outside<uint4>(p.dv, int64_t(p.value_heads) * kPieces, begin, end, p.tokens);
    clear_outside<uint4>(p.dg, g_pieces, begin, end, p.tokens);
    clear_outside<uint16_t>(p.dbeta, beta_pieces, begin, end, p.tokens);
  }
  if (p.heads != p.value_heads) {
    sum_groups<T>(p, p.dq, in_workspace<float4>(arguments, layout.dq), begin, end);
    sum_groups<T>(p, p.dk, in_workspace<float4>(arguments, layout.dk), begin, end);
  }
}

template <typename T>
cudaError_t launch_reduce(const ChunkKdaBwdParams& p, const Plan& plan, cudaStream_t stream) {
  const ReduceArguments arguments = {p, plan};
  if (p.dA_log || p.d_dt_bias) {
    gate_sums_kernel<<<p.value_heads * kSumParts, kSumThreads, 0, stream>>>(arguments);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  if (p.cu_seqlens || p.heads != p.value_heads)
    rows_kernel<T><<<p.sm_count * kRowsBlocksPerSm, kRowsThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace flashkda::chunk_kda_bwd
