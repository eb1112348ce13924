#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "params.h"
#include "sm90/chunk_kda_bwd/config.h"

namespace flashkda {

// Bytes of device memory the call needs at params.workspace.
size_t chunk_kda_bwd_workspace_bytes(int batch, int sequences, int heads, int value_heads, int64_t tokens,
                                     bool has_cu_seqlens, int sm_count);

// With `clusters` scans may wait for GPCs of their own. A kernel that holds part of each must not wait for them.
cudaError_t launch_chunk_kda_bwd(const ChunkKdaBwdParams& params, bool clusters, cudaStream_t stream);

namespace chunk_kda_bwd {

// The steps of a call, in order. T: __nv_bfloat16 or __half. G: T or float. kBounded: the bounded gate, else the other
// two.

// states.cuh: scans every sequence from both ends; leaves the states at the borders of tiles, and d_initial_state.
// kScans: halves of a value head's V that a block takes.
template <typename T, typename G, bool kBounded, int kScans>
cudaError_t launch_states(const ChunkKdaBwdParams& params, const Plan& plan, cudaStream_t stream);

// gradients.cuh: tile by tile, the gradients of all that tokens have, and partial sums of those of A_log and dt_bias.
template <typename T, typename G, bool kBounded>
cudaError_t launch_gradients(const ChunkKdaBwdParams& params, const Plan& plan, cudaStream_t stream);

}  // namespace chunk_kda_bwd
}  // namespace flashkda
