#include "sm90/chunk_kda_bwd/gradients.cuh"

namespace flashkda::chunk_kda_bwd {
template cudaError_t launch_gradients<__nv_bfloat16, __nv_bfloat16, false>(const ChunkKdaBwdParams&, const Plan&,
                                                                           cudaStream_t);
}  // namespace flashkda::chunk_kda_bwd
