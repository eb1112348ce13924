#include "sm90/chunk_kda_fwd/kernel.cuh"

namespace flashkda::chunk_kda_fwd {
template cudaError_t launch<__half, float, true, 1>(const ChunkKdaFwdParams&, const Plan&, cudaStream_t);
template cudaError_t launch<__half, float, true, 2>(const ChunkKdaFwdParams&, const Plan&, cudaStream_t);
template cudaError_t launch_transitions<__half, float, true>(const ChunkKdaTransitionParams&, int, cudaStream_t);
}  // namespace flashkda::chunk_kda_fwd
