// Chunked KDA forward: the pipeline of chunk_kda/pipeline.cuh with a scan that writes o. Its roles are in items.cuh
// (the loader), chunk_kda/transform.cuh and scan.cuh; probe.cuh takes the scan's place ahead of calls in segments.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>

#include <type_traits>

#include "common/hopper.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda/tensor_map.h"
#include "sm90/chunk_kda/transform.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/items.cuh"
#include "sm90/chunk_kda_fwd/launch.h"
#include "sm90/chunk_kda_fwd/probe.cuh"
#include "sm90/chunk_kda_fwd/scan.cuh"

namespace flashkda::chunk_kda_fwd {

// With kProbe: the same pipeline ahead of the true one, for a few chunks before each segment, to find out which of them
// forget.
template <typename T, typename G, bool kBounded, int kScans, bool kProbe>
__global__ void __launch_bounds__(kThreads, 1) chunk_kda_fwd_kernel(const __grid_constant__ Arguments arguments) {
  using L = Layout<G, kScans, kOutputBytes>;
  extern __shared__ uint8_t unaligned[];
  const Block<L> block(unaligned, kProbe ? 1 : 4 * kScans * 32);

  if constexpr (kProbe) cudaTriggerProgrammaticLaunchCompletion();

  const int warp = threadIdx.x / 32;
  if (warp < 4 * kScans) {
    cutlass::arch::warpgroup_reg_alloc<L::kScanRegisters>();
    if constexpr (kProbe) {
      if (threadIdx.x == 0) collect<L>(arguments, block.shared, block.barriers);
    } else {
      scan<T, L>(arguments.p, block.shared, block.barriers);
    }
  } else {
    cutlass::arch::warpgroup_reg_dealloc<L::kTransformRegisters>();
    constexpr Pass kPass = kProbe ? Pass::kProbe : Pass::kPrefill;
    const int role = warp - 4 * kScans;
    if (role < L::kTransformWarps) {
      transform<T, L, kBounded, kPass>(arguments.p, block.shared, block.bias(role), block.barriers, role);
    } else if (role == L::kTransformWarps && threadIdx.x % 32 == 0) {
      load<L, kProbe>(arguments, block.shared, block.infos(), block.barriers);
    }
  }
}

template <typename T, typename G, bool kBounded, int kScans>
cudaError_t launch(const ChunkKdaFwdParams& p, const Plan& plan, cudaStream_t stream) {
  constexpr int kBytes = Layout<G, kScans, kOutputBytes>::kBytes;
  Arguments arguments;
  arguments.p = p;
  arguments.segments = plan.segments;
  arguments.segment_chunks = plan.segment_chunks;
  arguments.warm_ups = plan.segments > 1 ? static_cast<int*>(p.workspace) : nullptr;
  if (!encode_tokens<T, G>(arguments, p, kChunk)) return cudaErrorInvalidValue;

  if constexpr (kScans == 1) {
    if (plan.segments > 1) {
      const cudaError_t error = launch_pipeline<chunk_kda_fwd_kernel<T, G, kBounded, 1, true>>(
          arguments, plan.probe_grid, kBytes, false, stream);
      if (error != cudaSuccess) return error;
    }
  }
  const bool overlap = p.cu_seqlens || plan.segments > 1;  // with the plan, or the probe
  return launch_pipeline<chunk_kda_fwd_kernel<T, G, kBounded, kScans, false>>(arguments, plan.grid, kBytes, overlap,
                                                                              stream);
}

}  // namespace flashkda::chunk_kda_fwd
