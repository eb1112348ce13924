#include "sm90/recurrent_kda/kernel.cuh"

namespace flashkda::recurrent_kda {

template cudaError_t launch<__nv_bfloat16, float>(const RecurrentKdaParams&, int, cudaStream_t);

}  // namespace flashkda::recurrent_kda
