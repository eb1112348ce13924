// Chunked KDA forward: the pipeline of chunk_kda/pipeline.cuh with a scan that writes o. Its roles are in loader.cuh,
// chunk_kda/transform.cuh and scan.cuh. Dense calls of few heads run in segments: transition.cuh finds
// what each does to the state that enters it, entry.cuh takes states through. Where heads do not fill the chip evenly,
// shares.cuh comes first, which does it all where gates are fast.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cmath>
#include <type_traits>

#include "common/hopper.cuh"
#include "common/launch.h"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda/tensor_map.h"
#include "sm90/chunk_kda/transform.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/items.cuh"
#include "sm90/chunk_kda_fwd/launch.h"
#include "sm90/chunk_kda_fwd/loader.cuh"
#include "sm90/chunk_kda_fwd/scan.cuh"
#include "sm90/chunk_kda_fwd/shares.cuh"
#include "sm90/chunk_kda_fwd/transition.cuh"

namespace flashkda::chunk_kda_fwd {

template <typename G, int kScans, Cut kCut>
using PrefillLayout = Layout<G, kScans, kOutputBytes + (kCut == Cut::kShares ? Attempt::kBytes / (4 * kScans) : 0),
                             kCut == Cut::kMapsFirst   ? 208
                             : kCut == Cut::kMapsAhead ? 152
                                                       : 144,
                             in_segments(kCut) ? kMapBytes : 0, kCut == Cut::kMapsFirst>;

// Of all threads of a pass that may come after shares, whose blocks run on beside it. Whether it is known that they
// leave it nothing to do, in which case it waits for them.
template <typename SomeArguments>
__device__ __forceinline__ bool is_done(const SomeArguments& arguments) {
  if (!arguments.shares.words) return false;
  bool is_done = false;
  if (threadIdx.x == 0) {
    is_done = all_shares_right(arguments.shares);
    if (is_done) cudaGridDependencySynchronize();
  }
  return __syncthreads_or(is_done);
}

// One prefill, in segments or not. Barriers and roles: chunk_kda/pipeline.cuh.
template <typename T, typename G, bool kBounded, int kScans, Cut kCut>
__global__ void __launch_bounds__(kThreads, 1) chunk_kda_fwd_kernel(const __grid_constant__ Arguments arguments) {
  using L = PrefillLayout<G, kScans, kCut>;
  constexpr bool kShares = kCut == Cut::kShares, kMapsFirst = kCut == Cut::kMapsFirst;
  constexpr bool kSegments = in_segments(kCut);
  if constexpr (!kShares) {
    if (is_done(arguments)) return;
  }
  extern __shared__ uint8_t unaligned[];
  constexpr int kLoader = kThreads - 32;
  [[maybe_unused]] int issued = 0;
  const Block<L> block(unaligned, 4 * kScans * 32, kShares ? kLoader : 0, [&](const Block<L>& block) {
    if constexpr (kShares) issued = issue_first(arguments, block);
  });
  [[maybe_unused]] Attempt attempt = {};
  if constexpr (kShares) attempt = attempt_of<L>(block.shared);
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
    scan<T, L, kCut>(arguments, block.shared, block.barriers);
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
      int first_head = -1;
      if constexpr (kShares) first_head = head_of_block(arguments);
      transform<T, L, kBounded, kShares ? Pass::kShares : Pass::kPrefill>(arguments.p, block.shared, bias,
                                                                          block.barriers, cursor, attempt, first_head);
    } else if (threadIdx.x == kLoader) {
      if constexpr (kShares) {
        load_share<L>(arguments, block, issued);
      } else {
        load<L, kCut>(arguments, block);
      }
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
  if constexpr (kSegments) {
    cudaTriggerProgrammaticLaunchCompletion();
    if (is_done(arguments)) return;
  }
  extern __shared__ uint8_t unaligned[];
  const Block<L> block(unaligned, 128);
  if (threadIdx.x == 0) *Verdict{block.shared + L::kOutput}.word() = 0;
  __syncthreads();

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
  return flashkda::launch<chunk_kda_transition_kernel<T, G, kBounded, false>>(
      arguments, {dim3(grid), kThreads, TransitionLayout<G>::kBytes, overlap}, stream);
}

// Who reads the words waits for this kernel, and the rest of the launch need not.
static __global__ void clear_kernel(int* words, int count) {
  cudaTriggerProgrammaticLaunchCompletion();
  for (int i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
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
  const dim3 shares_grid =
      p.cu_seqlens ? dim3(plan.shares_grid) : dim3(plan.pieces, p.value_heads, p.sequences);  // as read_piece has it
  const auto launch_prefill = [&](auto cut, bool overlap) {
    constexpr Cut kCut = decltype(cut)::value;
    constexpr int kBlockScans = kCut == Cut::kShares ? 2 : kScans;
    const dim3 grid = kCut == Cut::kShares ? shares_grid : dim3(plan.grid);
    return flashkda::launch<chunk_kda_fwd_kernel<T, G, kBounded, kBlockScans, kCut>>(
        arguments, {grid, kThreads, PrefillLayout<G, kBlockScans, kCut>::kBytes, overlap}, stream);
  };
  char* const workspace = static_cast<char*>(p.workspace);
  const SegmentLayout layout = segment_layout(int64_t(p.sequences) * p.value_heads, plan.segments);
  if (plan.segments > 1) {
    segmented.maps = workspace + layout.maps;
    segmented.offsets = workspace + layout.offsets;
    segmented.status = reinterpret_cast<int*>(workspace + layout.status);
  }

  // Words that begin as zeros: those of segments, then those of shares. A packed call's plan clears the latter.
  const bool clears_status = plan.cut == Cut::kMapsFirst, has_shares = plan.shares_grid > 0;
  if (clears_status || (has_shares && !p.cu_seqlens)) {
    char* const begin = workspace + (clears_status ? layout.status : plan.shares.words);
    char* const end = workspace + (has_shares ? plan.shares.words_end : layout.bytes);
    clear_kernel<<<1, 128, 0, stream>>>(reinterpret_cast<int*>(begin), int((end - begin) / sizeof(int)));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  if (has_shares) {
    arguments.shares.words = reinterpret_cast<int*>(workspace + plan.shares.words);
    if (p.cu_seqlens) arguments.shares.packed_pieces = reinterpret_cast<Piece*>(workspace + plan.shares.pieces);
    arguments.shares.share = plan.share;
    arguments.shares.pieces = plan.pieces;
    arguments.shares.grid = plan.shares_grid;
    arguments.shares.all_right = p.pool.states ? -1 : plan.shares_grid;  // no word tells of padding
    arguments.shares.warm_up = plan.warm_up;
    arguments.shares.most_kept = std::exp2(-12.f / float(plan.warm_up));
    const cudaError_t error = launch_prefill(std::integral_constant<Cut, Cut::kShares>{}, true);
    if (error != cudaSuccess) return error;
  }

  // A packed call's overlaps with its plan.
  if (plan.cut == Cut::kWhole)
    return launch_prefill(std::integral_constant<Cut, Cut::kWhole>{}, has_shares || p.cu_seqlens);
  if constexpr (kScans == 1) {
    if (plan.cut == Cut::kMapsFirst) return launch_prefill(std::integral_constant<Cut, Cut::kMapsFirst>{}, true);
  }
  TransitionArguments ahead = {arguments.q, arguments.k, arguments.v, arguments.g};
  static_cast<ChunkKdaParams&>(ahead.p) = p;
  ahead.segmented = segmented;
  ahead.shares = arguments.shares;
  const cudaError_t error = flashkda::launch<chunk_kda_transition_kernel<T, G, kBounded, true>>(
      ahead, {dim3(plan.transition_grid), kThreads, TransitionLayout<G>::kBytes, has_shares}, stream);
  if (error != cudaSuccess) return error;
  return launch_prefill(std::integral_constant<Cut, Cut::kMapsAhead>{}, true);
}

}  // namespace flashkda::chunk_kda_fwd
