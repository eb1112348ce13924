#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashkda::recurrent_kda {

// Defined in kernel.cuh, instantiated for tokens T of __nv_bfloat16 and __half and a State of float and __nv_bfloat16:
// one file each. rows_per_warp is 2, 4 or 8 (config.h).
template <typename T, typename State>
cudaError_t launch(const RecurrentKdaParams& params, int rows_per_warp, cudaStream_t stream);

}  // namespace flashkda::recurrent_kda
