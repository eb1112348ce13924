// Chooses the instantiation, and runs the steps of a call.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/chunk_kda/plan.cuh"
#include "sm90/chunk_kda_bwd/config.h"
#include "sm90/chunk_kda_bwd/launch.h"
#include "sm90/chunk_kda_bwd/reduce.cuh"

namespace flashkda {
namespace {

using chunk_kda_bwd::Plan;

template <typename T, typename G, bool kBounded>
cudaError_t launch_steps(const ChunkKdaBwdParams& p, const Plan& plan, cudaStream_t stream) {
  using namespace chunk_kda_bwd;
  cudaError_t error = plan.scans == 1 ? launch_states<T, G, kBounded, 1>(p, plan, stream)
                                      : launch_states<T, G, kBounded, 2>(p, plan, stream);
  if (error != cudaSuccess || !p.of_tokens()) return error;
  error = launch_gradients<T, G, kBounded>(p, plan, stream);
  return error != cudaSuccess ? error : launch_reduce<T>(p, plan, stream);
}

template <typename T, typename G>
cudaError_t launch_gate(const ChunkKdaBwdParams& p, const Plan& plan, cudaStream_t stream) {
  return p.gate == Gate::kBounded ? launch_steps<T, G, true>(p, plan, stream)
                                  : launch_steps<T, G, false>(p, plan, stream);
}

template <typename T>
cudaError_t launch_dtype(const ChunkKdaBwdParams& p, const Plan& plan, cudaStream_t stream) {
  return p.g_dtype == Dtype::kFloat32 ? launch_gate<T, float>(p, plan, stream) : launch_gate<T, T>(p, plan, stream);
}

}  // namespace

size_t chunk_kda_bwd_workspace_bytes(int batch, int sequences, int heads, int value_heads, int64_t tokens,
                                     bool has_cu_seqlens, int sm_count) {
  return chunk_kda_bwd::plan(batch, sequences, heads, value_heads, tokens, has_cu_seqlens, sm_count).workspace.bytes;
}

cudaError_t launch_chunk_kda_bwd(const ChunkKdaBwdParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::kFloat32 || (p.g_dtype != p.dtype && p.g_dtype != Dtype::kFloat32))
    return cudaErrorInvalidValue;
  const Plan plan =
      chunk_kda_bwd::plan(p.batch, p.sequences, p.heads, p.value_heads, p.tokens, p.cu_seqlens != nullptr, p.sm_count);
  if (p.cu_seqlens) {
    char* workspace = static_cast<char*>(p.workspace);
    int* tile_offsets = reinterpret_cast<int*>(workspace + plan.workspace.tile_offsets);
    const cudaError_t error =
        chunk_kda::launch_plan(p, workspace + plan.workspace.plan, tile_offsets, chunk_kda_bwd::kTile, stream);
    if (error != cudaSuccess) return error;
  }
  return p.dtype == Dtype::kBFloat16 ? launch_dtype<__nv_bfloat16>(p, plan, stream)
                                     : launch_dtype<__half>(p, plan, stream);
}

}  // namespace flashkda
