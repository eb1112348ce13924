// Chooses the instantiation, and plans packed calls.
#include <algorithm>

#include "sm90/chunk_kda/dispatch.h"
#include "sm90/chunk_kda/plan.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/launch.h"
#include "sm90/chunk_kda_fwd/plan_shares.cuh"
#include "sm90/chunk_kda_fwd/pool.cuh"

namespace flashkda {
namespace {

cudaError_t plan_packed(const ChunkKdaParams& p, const chunk_kda_fwd::Plan& plan, cudaStream_t stream) {
  if (!p.cu_seqlens) return cudaSuccess;
  if (plan.shares_grid > 0) return chunk_kda_fwd::launch_plan_shares(p, plan, stream);
  return chunk_kda::launch_plan(p, static_cast<char*>(p.workspace), nullptr, 0, stream);
}

}  // namespace

size_t chunk_kda_fwd_workspace_bytes(int sequences, int value_heads, int64_t tokens, bool has_cu_seqlens,
                                     bool one_segment, int sm_count, bool has_pool, int checkpoints) {
  return chunk_kda_fwd::plan(sequences, value_heads, tokens, has_cu_seqlens, one_segment, sm_count, has_pool,
                             checkpoints)
      .workspace_bytes;
}

cudaError_t launch_chunk_kda_fwd(const ChunkKdaFwdParams& params, cudaStream_t stream) {
  return chunk_kda::dispatch(params, [&](auto token, auto gate, auto bounded) {
    using T = decltype(token);
    using G = decltype(gate);
    constexpr bool kBounded = decltype(bounded)::value;
    ChunkKdaFwdParams p = params;
    const chunk_kda_fwd::Plan plan =
        chunk_kda_fwd::plan(p.sequences, p.value_heads, p.tokens, p.cu_seqlens != nullptr, p.one_segment, p.sm_count,
                            p.pool.states != nullptr, p.pool.checkpoints);
    cudaError_t error = plan_packed(p, plan, stream);
    if (error == cudaSuccess && p.pool.states) error = chunk_kda_fwd::prepare_pool(p, plan, stream);
    if (error != cudaSuccess) return error;
    return plan.scans == 1 ? chunk_kda_fwd::launch<T, G, kBounded, 1>(p, plan, stream)
                           : chunk_kda_fwd::launch<T, G, kBounded, 2>(p, plan, stream);
  });
}

size_t chunk_kda_transition_workspace_bytes(int sequences, bool has_cu_seqlens) {
  return has_cu_seqlens ? chunk_kda::plan_layout(sequences).bytes : 0;
}

cudaError_t launch_chunk_kda_transition(const ChunkKdaTransitionParams& p, cudaStream_t stream) {
  const int64_t items = 2 * int64_t(p.sequences) * p.value_heads;
  const int grid = int(std::min<int64_t>(items, p.sm_count));
  return chunk_kda::dispatch(p, [&](auto token, auto gate, auto bounded) {
    const cudaError_t error = plan_packed(p, {}, stream);
    if (error != cudaSuccess) return error;
    return chunk_kda_fwd::launch_transitions<decltype(token), decltype(gate), decltype(bounded)::value>(p, grid,
                                                                                                        stream);
  });
}

}  // namespace flashkda
