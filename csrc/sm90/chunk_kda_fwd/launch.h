#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "params.h"
#include "sm90/chunk_kda_fwd/config.h"

namespace flashkda {

// Bytes of device memory the call needs at params.workspace.
size_t chunk_kda_fwd_workspace_bytes(int sequences, int value_heads, int64_t tokens, bool has_cu_seqlens,
                                     bool one_segment, int sm_count, bool has_pool, int checkpoints);

cudaError_t launch_chunk_kda_fwd(const ChunkKdaFwdParams& params, cudaStream_t stream);

// Bytes of device memory the transitions of whole sequences need at params.workspace.
size_t chunk_kda_transition_workspace_bytes(int sequences, bool has_cu_seqlens);

cudaError_t launch_chunk_kda_transition(const ChunkKdaTransitionParams& params, cudaStream_t stream);

namespace chunk_kda_fwd {

// Defined in kernel.cuh, instantiated one T, G and gate a file. T: __nv_bfloat16 or __half. G: T or float. kBounded:
// the bounded gate, else the other two. kScans: halves of a value head's V that a block takes.
template <typename T, typename G, bool kBounded, int kScans>
cudaError_t launch(const ChunkKdaFwdParams& params, const Plan& plan, cudaStream_t stream);

template <typename T, typename G, bool kBounded>
cudaError_t launch_transitions(const ChunkKdaTransitionParams& params, int grid, cudaStream_t stream);

}  // namespace chunk_kda_fwd
}  // namespace flashkda
