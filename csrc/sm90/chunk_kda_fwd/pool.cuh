// What a call on a pool does ahead of its scan.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "common/indices.cuh"
#include "params.h"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda_fwd/config.h"

namespace flashkda::chunk_kda_fwd {

constexpr int kOrderThreads = 128;
constexpr int kCopyThreads = 256;
constexpr int kCopyElements = 4;  // a thread's

// A sequence's checkpoints, one block: those that are to be left come first, by their tokens.
__global__ void __launch_bounds__(kOrderThreads)
    order_checkpoints_kernel(const __grid_constant__ ChunkKdaFwdParams p, Checkpoint* ordered) {
  __shared__ int tokens[kOrderThreads];
  const int sequence = blockIdx.x, count = p.pool.checkpoints;
  int length = int(p.tokens);
  if (p.cu_seqlens) {
    const int* offsets = chunk_kda::packed_offsets(p.workspace, p.sequences);
    length = offsets[sequence + 1] - offsets[sequence];
  }
  const int64_t first = int64_t(sequence) * count;
  const auto is_row = [&](int64_t row) { return row >= 0 && row < p.pool.rows; };
  const bool is_padding = !is_row(load_index(p.pool.indices, sequence * p.pool.indices.stride));
  const auto read = [&](int i) -> Checkpoint {
    if (is_padding || i >= count) return {kNoCheckpoint, -1};
    const int64_t offset = load_index(p.pool.checkpoint_offsets, first + i);
    const int64_t row = load_index(p.pool.checkpoint_indices, first + i);
    if (offset < 1 || offset > length || !is_row(row)) return {kNoCheckpoint, -1};
    return {int(offset), int(row)};
  };
  for (int mine = threadIdx.x; mine - int(threadIdx.x) < count; mine += kOrderThreads) {
    const Checkpoint checkpoint = read(mine);
    int rank = 0;  // how many come before; of equal ones, the first
    for (int others = 0; others < count; others += kOrderThreads) {
      __syncthreads();
      tokens[threadIdx.x] = read(others + threadIdx.x).tokens;
      __syncthreads();
      const int here = min(kOrderThreads, count - others);
      for (int i = 0; i < here; ++i)
        rank += tokens[i] < checkpoint.tokens || (tokens[i] == checkpoint.tokens && others + i < mine);
    }
    if (mine < count) ordered[first + rank] = checkpoint;
  }
}

// Dense fp32 copies of the initial states, zeros for a sequence that has none.
__global__ void __launch_bounds__(kCopyThreads)
    copy_initial_states_kernel(const __grid_constant__ ChunkKdaFwdParams p, float* copies) {
  const int sequence = blockIdx.y;
  const int64_t row = load_index(p.pool.indices, sequence * p.pool.indices.stride);
  if (row < 0 || row >= p.pool.rows) return;  // padding: nothing reads its copy
  const int element = (blockIdx.x * kCopyThreads + threadIdx.x) * kCopyElements;
  const int64_t from = row * p.pool.stride + element;
  float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
  if (!p.pool.has_initial_state || p.pool.has_initial_state[sequence]) {
    if (p.pool.dtype == Dtype::kFloat32) {
      x = *reinterpret_cast<const float4*>(static_cast<const float*>(p.pool.states) + from);
    } else {
      const auto* pairs =
          reinterpret_cast<const __nv_bfloat162*>(static_cast<const __nv_bfloat16*>(p.pool.states) + from);
      const float2 low = __bfloat1622float2(pairs[0]), high = __bfloat1622float2(pairs[1]);
      x = make_float4(low.x, low.y, high.x, high.y);
    }
  }
  const int64_t state_elements = int64_t(p.value_heads) * kHeadDim * kHeadDim;
  *reinterpret_cast<float4*>(copies + sequence * state_elements + element) = x;
}

// Behind the plan of a packed call. Sets p.initial_state where the scan is to read copies.
inline cudaError_t prepare_pool(ChunkKdaFwdParams& p, const Plan& plan, cudaStream_t stream) {
  char* const workspace = static_cast<char*>(p.workspace) + plan.pool_offset;
  if (p.pool.checkpoints > 0) {
    order_checkpoints_kernel<<<p.sequences, kOrderThreads, 0, stream>>>(p, reinterpret_cast<Checkpoint*>(workspace));
    return cudaGetLastError();
  }
  if (!plan.copies_initial_states()) return cudaSuccess;
  float* const copies = reinterpret_cast<float*>(workspace);
  const dim3 grid(p.value_heads * (kHeadDim * kHeadDim / (kCopyThreads * kCopyElements)), p.sequences);
  copy_initial_states_kernel<<<grid, kCopyThreads, 0, stream>>>(p, copies);
  p.initial_state = copies;
  return cudaGetLastError();
}

}  // namespace flashkda::chunk_kda_fwd
