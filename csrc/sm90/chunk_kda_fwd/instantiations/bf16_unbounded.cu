#include "sm90/chunk_kda_fwd/kernel.cuh"

namespace flashkda::chunk_kda_fwd {
template cudaError_t launch<__nv_bfloat16, __nv_bfloat16, false, 1>(const ChunkKdaFwdParams&, const Plan&,
                                                                    cudaStream_t);
template cudaError_t launch<__nv_bfloat16, __nv_bfloat16, false, 2>(const ChunkKdaFwdParams&, const Plan&,
                                                                    cudaStream_t);
template cudaError_t launch_transitions<__nv_bfloat16, __nv_bfloat16, false>(const ChunkKdaTransitionParams&, int,
                                                                             cudaStream_t);
}  // namespace flashkda::chunk_kda_fwd
