#include "sm90/chunk_kda_bwd/gradients.cuh"

namespace flashkda::chunk_kda_bwd {
template cudaError_t launch_gradients<__half, __half, false>(const ChunkKdaBwdParams&, const Plan&, cudaStream_t);
}  // namespace flashkda::chunk_kda_bwd
