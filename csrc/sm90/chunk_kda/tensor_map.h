// TMA descriptors of [batch, tokens, heads, 128] tensors with free strides.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <type_traits>

#include "common/context.h"
#include "params.h"
#include "sm90/chunk_kda/config.h"

namespace flashkda::chunk_kda {

// Boxes of `box_tokens` tokens x 128 bytes of one head, in the 128-byte swizzle. Tokens past the end of the tensor read
// as zero.
template <typename Element>
bool encode_tiles(CUtensorMap* map, const void* base, int batch, int64_t tokens, int heads,
                  const BatchedStrides& stride, int box_tokens) {
  constexpr int element_bytes = sizeof(Element);
  constexpr CUtensorMapDataType type = std::is_same_v<Element, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                       : std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  static const auto encoder = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled", 12000);
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

// Those of q, k, v and g.
template <typename T, typename G, typename Arguments>
bool encode_tokens(Arguments& a, const ChunkKdaParams& p, int box_tokens) {
  return encode_tiles<T>(&a.q, p.q, p.batch, p.tokens, p.heads, p.q_stride, box_tokens) &&
         encode_tiles<T>(&a.k, p.k, p.batch, p.tokens, p.heads, p.k_stride, box_tokens) &&
         encode_tiles<T>(&a.v, p.v, p.batch, p.tokens, p.value_heads, p.v_stride, box_tokens) &&
         encode_tiles<G>(&a.g, p.g, p.batch, p.tokens, p.value_heads, p.g_stride, box_tokens);
}

}  // namespace flashkda::chunk_kda
