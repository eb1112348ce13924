// From what a call says of its types to the template arguments of its kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "params.h"

namespace flashkda::chunk_kda {

// Calls `launch` with values of the types T of the tokens and G of their gates, and whether these are bounded; not at
// all where no kernel takes such types.
template <typename Launch>
cudaError_t dispatch(const ChunkKdaParams& p, Launch launch) {
  if (p.dtype == Dtype::kFloat32 || (p.g_dtype != p.dtype && p.g_dtype != Dtype::kFloat32))
    return cudaErrorInvalidValue;
  const auto with_gate = [&](auto token, auto gate) {
    return p.gate == Gate::kBounded ? launch(token, gate, std::true_type{}) : launch(token, gate, std::false_type{});
  };
  const auto with_token = [&](auto token) {
    return p.g_dtype == Dtype::kFloat32 ? with_gate(token, float{}) : with_gate(token, token);
  };
  return p.dtype == Dtype::kBFloat16 ? with_token(__nv_bfloat16{}) : with_token(__half{});
}

}  // namespace flashkda::chunk_kda
