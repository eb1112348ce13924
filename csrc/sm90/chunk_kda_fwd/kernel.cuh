// Chunked KDA forward: the pipeline of chunk_kda/pipeline.cuh with a scan that writes o. Its roles are in items.cuh
// (the loader), chunk_kda/transform.cuh and scan.cuh. Dense calls of few heads run in segments: transition.cuh finds
// what each does to the state that enters it, entry.cuh takes states through.
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
#include "sm90/chunk_kda_fwd/scan.cuh"
#include "sm90/chunk_kda_fwd/transition.cuh"

namespace flashkda::chunk_kda_fwd {

template <typename G, int kScans, Cut kCut>
using PrefillLayout = Layout<G, kScans, kOutputBytes,
                             kCut == Cut::kMapsFirst   ? 208
                             : kCut == Cut::kMapsAhead ? 152
                                                       : 144,
                             kCut == Cut::kWhole ? 0 : kMapBytes, kCut == Cut::kMapsFirst>;

// One prefill, in segments or not. Barriers and roles: chunk_kda/pipeline.cuh.
template <typename T, typename G, bool kBounded, int kScans, Cut kCut>
__global__ void __launch_bounds__(kThreads, 1) chunk_kda_fwd_kernel(const __grid_constant__ Arguments arguments) {
  using L = PrefillLayout<G, kScans, kCut>;
  constexpr bool kSegments = kCut != Cut::kWhole, kMapsFirst = kCut == Cut::kMapsFirst;
  extern __shared__ uint8_t unaligned[];
  const Block<L> block(unaligned, 4 * kScans * 32);
  if constexpr (kSegments) {
    if (threadIdx.x == 0) {
      MapRing(block.shared + L::kMaps, block.shared + L::kMapBarriers).init(4 * kScans * 32);
      if constexpr (kMapsFirst) {
        block.init(block.first_barriers(), 128);
        mbarrier_init(block.handover(), 128 + 32 * TransitionStage<L>::kTransformWarps);
        *Verdict{block.shared + L::kOutput}.word() = 0;
      }
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
  }

  const int warp = threadIdx.x / 32;
  if (warp < 4 * kScans) {
    cutlass::arch::warpgroup_reg_alloc<L::kScanRegisters>();
    if constexpr (kMapsFirst)
      scan_transitions<L, true, true>(arguments, block.shared, block.first_barriers(), block.handover());
    scan<T, L, kSegments>(arguments, block.shared, block.barriers);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<L::kTransformRegisters>();
    const int role = warp - 4 * kScans;
    const uint32_t bias = block.bias(role);
    if constexpr (kMapsFirst) {
      using First = TransitionStage<L>;
      if (role < First::kTransformWarps) {
        Cursor<L::kStages> cursor(role);
        transform<T, First, kBounded, Pass::kTransition>(arguments.p, block.shared, bias, block.first_barriers(),
                                                         cursor);
        mbarrier_arrive(block.handover());
      }
    }
    if (role < L::kTransformWarps) {
      Cursor<L::kStages> cursor(role);
      transform<T, L, kBounded, Pass::kPrefill>(arguments.p, block.shared, bias, block.barriers, cursor);
    } else if (role == L::kOtherWarps && threadIdx.x % 32 == 0) {
      load<L, kCut>(arguments, block);
    }
  }
}

// Of whole sequences, or ahead of a prefill in segments.
template <typename G>
using TransitionLayout = Layout<G, 1, Verdict::kBytes / 4, 208>;

template <typename T, typename G, bool kBounded, bool kSegments>
__global__ void __launch_bounds__(kThreads, 1)
    chunk_kda_transition_kernel(const __grid_constant__ TransitionArguments arguments) {
  using L = TransitionLayout<G>;
  extern __shared__ uint8_t unaligned[];
  const Block<L> block(unaligned, 128);
  if (threadIdx.x == 0) *Verdict{block.shared + L::kOutput}.word() = 0;
  __syncthreads();
  if constexpr (kSegments) cudaTriggerProgrammaticLaunchCompletion();

  const int warp = threadIdx.x / 32;
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_alloc<L::kScanRegisters>();
    scan_transitions<L, kSegments, false>(arguments, block.shared, block.barriers, 0);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<L::kTransformRegisters>();
    const int role = warp - 4;
    if (role < L::kTransformWarps) {
      Cursor<L::kStages> cursor(role);
      transform<T, TransitionStage<L>, kBounded, Pass::kTransition>(arguments.p, block.shared, block.bias(role),
                                                                    block.barriers, cursor);
    } else if (role == L::kOtherWarps && threadIdx.x % 32 == 0) {
      load_transitions<L, kSegments>(arguments, block.shared, block.infos(), block.barriers);
    }
  }
}

template <typename T, typename G, bool kBounded>
cudaError_t launch_transitions(const ChunkKdaTransitionParams& p, int grid, cudaStream_t stream) {
  TransitionArguments arguments = {};
  arguments.p = p;
  if (!encode_tokens<T, G>(arguments, p, kChunk)) return cudaErrorInvalidValue;
  const bool overlap = p.cu_seqlens;  // with the plan
  return launch_pipeline<chunk_kda_transition_kernel<T, G, kBounded, false>>(
      arguments, grid, TransitionLayout<G>::kBytes, overlap, stream);
}

// The first block that comes by may read them: the rest of the launch need not wait.
inline __global__ void clear_status_kernel(int* status, int words) {
  cudaTriggerProgrammaticLaunchCompletion();
  for (int i = threadIdx.x; i < words; i += blockDim.x) status[i] = kMapPending;
}

template <typename T, typename G, bool kBounded, int kScans>
cudaError_t launch(const ChunkKdaFwdParams& p, const Plan& plan, cudaStream_t stream) {
  Arguments arguments = {};
  arguments.p = p;
  SegmentArguments& segmented = arguments.segmented;
  segmented.segments = plan.segments;
  segmented.segment_chunks = plan.segment_chunks;
  arguments.checkpoints = reinterpret_cast<const Checkpoint*>(static_cast<char*>(p.workspace) + plan.pool_offset);
  if (!encode_tokens<T, G>(arguments, p, kChunk)) return cudaErrorInvalidValue;
  const auto launch_prefill = [&](auto cut, bool overlap) {
    constexpr Cut kCut = decltype(cut)::value;
    return launch_pipeline<chunk_kda_fwd_kernel<T, G, kBounded, kScans, kCut>>(
        arguments, plan.grid, PrefillLayout<G, kScans, kCut>::kBytes, overlap, stream);
  };
  // A packed call's overlaps with its plan.
  if (plan.cut == Cut::kWhole) return launch_prefill(std::integral_constant<Cut, Cut::kWhole>{}, p.cu_seqlens);

  const SegmentLayout layout = segment_layout(int64_t(p.sequences) * p.value_heads, plan.segments);
  char* workspace = static_cast<char*>(p.workspace);
  segmented.maps = workspace + layout.maps;
  segmented.offsets = workspace + layout.offsets;
  segmented.status = reinterpret_cast<int*>(workspace + layout.status);
  if constexpr (kScans == 1) {
    if (plan.cut == Cut::kMapsFirst) {
      clear_status_kernel<<<1, 128, 0, stream>>>(segmented.status, int((layout.bytes - layout.status) / sizeof(int)));
      const cudaError_t error = cudaGetLastError();
      if (error != cudaSuccess) return error;
      return launch_prefill(std::integral_constant<Cut, Cut::kMapsFirst>{}, true);
    }
  }
  TransitionArguments ahead = {arguments.q, arguments.k, arguments.v, arguments.g};
  static_cast<ChunkKdaParams&>(ahead.p) = p;
  ahead.segmented = segmented;
  const cudaError_t error = launch_pipeline<chunk_kda_transition_kernel<T, G, kBounded, true>>(
      ahead, plan.transition_grid, TransitionLayout<G>::kBytes, false, stream);
  if (error != cudaSuccess) return error;
  return launch_prefill(std::integral_constant<Cut, Cut::kMapsAhead>{}, true);
}

}  // namespace flashkda::chunk_kda_fwd
