#include "sm90/recurrent_kda/kernel.cuh"

namespace flashkda::recurrent_kda {

template cudaError_t launch<__half, __nv_bfloat16>(const RecurrentKdaParams&, int, cudaStream_t);

}  // namespace flashkda::recurrent_kda
