#include "sm90/chunk_kda_bwd/states.cuh"

namespace flashkda::chunk_kda_bwd {
template cudaError_t launch_states<__half, __half, true, 1>(const ChunkKdaBwdParams&, const Plan&, cudaStream_t);
template cudaError_t launch_states<__half, __half, true, 2>(const ChunkKdaBwdParams&, const Plan&, cudaStream_t);
}  // namespace flashkda::chunk_kda_bwd
