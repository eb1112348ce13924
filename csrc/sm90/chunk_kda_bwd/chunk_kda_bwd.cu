// Chooses the instantiation, and runs the steps of a call.
#include "sm90/chunk_kda/dispatch.h"
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

}  // namespace

size_t chunk_kda_bwd_workspace_bytes(int batch, int sequences, int heads, int value_heads, int64_t tokens,
                                     bool has_cu_seqlens, int sm_count) {
  return chunk_kda_bwd::plan(batch, sequences, heads, value_heads, tokens, has_cu_seqlens, sm_count).workspace.bytes;
}

cudaError_t launch_chunk_kda_bwd(const ChunkKdaBwdParams& p, bool clusters, cudaStream_t stream) {
  Plan plan =
      chunk_kda_bwd::plan(p.batch, p.sequences, p.heads, p.value_heads, p.tokens, p.cu_seqlens != nullptr, p.sm_count);
  if (!clusters) plan.scan_cluster = 1;
  return chunk_kda::dispatch(p, [&](auto token, auto gate, auto bounded) {
    if (p.cu_seqlens) {
      char* workspace = static_cast<char*>(p.workspace);
      int* tile_offsets = reinterpret_cast<int*>(workspace + plan.workspace.tile_offsets);
      const cudaError_t error =
          chunk_kda::launch_plan(p, workspace + plan.workspace.plan, tile_offsets, chunk_kda_bwd::kTile, stream);
      if (error != cudaSuccess) return error;
    }
    return launch_steps<decltype(token), decltype(gate), decltype(bounded)::value>(p, plan, stream);
  });
}

}  // namespace flashkda
