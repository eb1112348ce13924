// Chooses the instantiation, and plans packed calls.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/chunk_kda/plan.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/launch.h"

namespace flashkda {
namespace {

template <typename T, typename G, bool kBounded>
cudaError_t launch_scans(const ChunkKdaFwdParams& p, cudaStream_t stream) {
  const chunk_kda_fwd::Plan plan =
      chunk_kda_fwd::plan(p.sequences, p.value_heads, p.tokens, p.cu_seqlens != nullptr, p.one_segment, p.sm_count);
  return plan.scans == 1 ? chunk_kda_fwd::launch<T, G, kBounded, 1>(p, plan, stream)
                         : chunk_kda_fwd::launch<T, G, kBounded, 2>(p, plan, stream);
}

template <typename T, typename G>
cudaError_t launch_gate(const ChunkKdaFwdParams& p, cudaStream_t stream) {
  return p.gate == Gate::kBounded ? launch_scans<T, G, true>(p, stream) : launch_scans<T, G, false>(p, stream);
}

template <typename T>
cudaError_t launch_dtype(const ChunkKdaFwdParams& p, cudaStream_t stream) {
  return p.g_dtype == Dtype::kFloat32 ? launch_gate<T, float>(p, stream) : launch_gate<T, T>(p, stream);
}

}  // namespace

size_t chunk_kda_fwd_workspace_bytes(int sequences, int value_heads, int64_t tokens, bool has_cu_seqlens,
                                     bool one_segment, int sm_count) {
  return chunk_kda_fwd::plan(sequences, value_heads, tokens, has_cu_seqlens, one_segment, sm_count).workspace_bytes;
}

cudaError_t launch_chunk_kda_fwd(const ChunkKdaFwdParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::kFloat32 || (p.g_dtype != p.dtype && p.g_dtype != Dtype::kFloat32))
    return cudaErrorInvalidValue;
  if (p.cu_seqlens) {
    const cudaError_t error = chunk_kda::launch_plan(p, static_cast<char*>(p.workspace), nullptr, 0, stream);
    if (error != cudaSuccess) return error;
  }
  return p.dtype == Dtype::kBFloat16 ? launch_dtype<__nv_bfloat16>(p, stream) : launch_dtype<__half>(p, stream);
}

}  // namespace flashkda
