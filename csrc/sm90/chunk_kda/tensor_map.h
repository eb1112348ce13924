// TMA descriptors of [batch, tokens, heads, 128] tensors with free strides.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "params.h"
#include "sm90/chunk_kda/config.h"

namespace flashkda::chunk_kda {

// The driver's function, found at run time: the extension links no libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)
               : nullptr;
  }();
  return encoder;
}

// Boxes of `box_tokens` tokens x 128 bytes of one head, in the 128-byte swizzle. Tokens past the end of the tensor read
// as zero.
inline bool encode_tiles(CUtensorMap* map, const void* base, CUtensorMapDataType type, int element_bytes, int batch,
                         int64_t tokens, int heads, const BatchedStrides& stride, int box_tokens) {
  const auto encoder = tensor_map_encoder();
  if (!encoder) return false;
  const cuuint64_t sizes[4] = {kHeadDim, cuuint64_t(std::max<int64_t>(tokens, 1)), cuuint64_t(heads),
                               cuuint64_t(batch)};
  // A stride over a single index is never taken, and may be anything in torch.
  const auto bytes = [&](int64_t elements, cuuint64_t size) -> cuuint64_t {
    return size > 1 ? cuuint64_t(elements) * element_bytes : 16;
  };
  const cuuint64_t strides[3] = {bytes(stride.token, sizes[1]), bytes(stride.head, sizes[2]),
                                 bytes(stride.batch, sizes[3])};
  const cuuint32_t box[4] = {cuuint32_t(128 / element_bytes), cuuint32_t(box_tokens), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  return encoder(map, type, 4, const_cast<void*>(base), sizes, strides, box, element_strides,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace flashkda::chunk_kda
