#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashkda::recurrent_kda {

// Defined in kernel.cuh, instantiated for __nv_bfloat16 and __half: one file each. rows_per_warp is 2, 4 or 8
// (config.h).
template <typename T>
cudaError_t launch(const RecurrentKdaParams& params, int rows_per_warp, cudaStream_t stream);

}  // namespace flashkda::recurrent_kda
