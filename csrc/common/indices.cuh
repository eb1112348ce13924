// Index tensors of either width.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace flashkda {

__device__ __forceinline__ int64_t load_index(Indices x, int64_t i) {
  return x.is_64bit ? __ldg(static_cast<const int64_t*>(x.values) + i)
                    : __ldg(static_cast<const int32_t*>(x.values) + i);
}

}  // namespace flashkda
