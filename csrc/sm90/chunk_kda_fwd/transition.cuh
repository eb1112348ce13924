// What a sequence, or each segment of one but the last, does to the state that enters it: S' = S R + B. With M_1 to M_n
// the transitions of its chunks, from the last to the first, beginning with R = I and B = 0:
//
//   E  = Kr R
//   D  = c A^T E
//   B += (V n_k)^T D
//   R <- M R = d R - Kd^T D
//
// with the factors as chunk_kda/pipeline.cuh has them, and everything transposed: a block has half of the rows of R^T
// and B^T. Where R has become zero for fp32, nothing before can matter: fast gates end here after a chunk or two.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>

#include "common/hopper.cuh"
#include "sm90/chunk_kda/loader.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda/state.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/offset.cuh"
#include "sm90/chunk_kda_fwd/shares.cuh"

namespace flashkda::chunk_kda_fwd {

using namespace chunk_kda;

struct TransitionArguments {
  CUtensorMap q, k, v, g;
  ChunkKdaTransitionParams p;
  // Of a prefill in segments. Otherwise whole sequences go to p.map and p.offset.
  SegmentArguments segmented;
  ShareArguments shares;
};

// The loader waits for a verdict behind so many chunks of a segment.
constexpr int kTrialChunks = 4;
constexpr int kChunksBetweenTrials = 16;

struct TransitionItem {
  int part;  // half of the rows
  int segment;
  int batch;
  int sequence;
  int value_head;
  int begin;
  int length;
};

// Of a segment that is not its sequence's last.
__device__ __forceinline__ TransitionItem transition_of(const SegmentArguments& segmented, int sequence, int value_head,
                                                        int segment, int part) {
  const int length = segmented.segment_chunks * kChunk;
  return {part, segment, sequence, sequence, value_head, segment * length, length};
}

template <bool kSegments>
__device__ __forceinline__ TransitionItem read_transition(const TransitionArguments& arguments, int index) {
  const ChunkKdaParams& p = arguments.p;
  TransitionItem item;
  item.part = index % 2;
  index /= 2;
  item.segment = 0;
  if constexpr (kSegments) {
    item.segment = index % (arguments.segmented.segments - 1);
    index /= arguments.segmented.segments - 1;
  }
  const int rank = index / p.value_heads;
  item.value_head = index - rank * p.value_heads;
  item.sequence = item.batch = rank;
  if constexpr (kSegments) {
    return transition_of(arguments.segmented, rank, item.value_head, item.segment, item.part);
  } else if (p.cu_seqlens) {
    const PackedSequence packed = packed_sequence(p.workspace, p.sequences, rank);
    item.sequence = packed.index;
    item.batch = 0;
    item.begin = packed.begin;
    item.length = packed.length;
  } else {
    item.begin = 0;
    item.length = int(p.tokens);
  }
  return item;
}

// What the scan shares, among its warps and with the loader.
struct Verdict {
  static constexpr int kBytes = 48;
  uint32_t address;

  // Of the last item that has one: 2 item + 1 to go on, 2 item + 2 to stop. An atomic, since only the scan's progress
  // and nothing else orders the loader's reads.
  __device__ int* word() const { return shared_pointer<int>(address); }
  // fp32 [2][4]: each warp's part of the squares of R^T, by turns.
  __device__ uint32_t sums(int turn) const { return address + 16 + turn * 16; }
};

// v lies where q would: a transition needs none.
template <typename L>
struct TransitionStage : L {
  static constexpr bool kQueries = false;
  static constexpr int kValueTiles = 2;
  __host__ __device__ static constexpr int value_offset(int tile) { return kQueryOffset + tile * 4096; }
};

// An item's chunks, from the last to the first. `count`: of the block's items before it.
template <typename Stage>
__device__ __forceinline__ void load_transition(Loader<Stage>& loader, const Maps& maps, Verdict verdict,
                                                const TransitionItem& item, int head, int count) {
  const int chunks = (item.length + kChunk - 1) / kChunk;
  for (int chunk = 0; chunk < max(chunks, 1); ++chunk) {
    if (chunk >= kTrialChunks) {
      int said;
      while ((said = atomicOr(verdict.word(), 0)) <= 2 * count) __nanosleep(50);
      if (said == 2 * count + 2) break;
    }
    ChunkInfo* info = loader.next_info();
    const int done = (chunks - 1 - chunk) * kChunk;
    const int token = item.begin + done;
    info->token = token;
    info->batch = item.batch;
    info->value_head = item.value_head;
    info->sequence = item.sequence;
    info->left = chunks > 0 ? item.length - done : 0;
    info->part = item.part;
    info->segment = item.segment;
    info->flags = 0;
    info->chunks = chunks;
    info->item = count;
    if (chunks > 0) {
      loader.load(maps, item.batch, token, head, item.value_head, 0);
    } else {
      loader.skip();
    }
  }
}

template <typename L, bool kSegments>
__device__ void load_transitions(const TransitionArguments& arguments, uint32_t shared, ChunkInfo* infos,
                                 Barriers barriers) {
  const ChunkKdaParams& p = arguments.p;
  const int items = 2 * p.sequences * p.value_heads * (kSegments ? arguments.segmented.segments - 1 : 1);
  int* ticket = static_cast<int*>(p.workspace);
  Loader<TransitionStage<L>> loader{shared, infos, barriers};
  const Maps maps{nullptr, &arguments.k, &arguments.v, &arguments.g};
  prefetch(maps);

  const bool after_shares = kSegments && arguments.shares.words;
  if constexpr (!kSegments) cudaGridDependencySynchronize();  // the plan
  int count = 0;
  const auto load_item = [&](const TransitionItem& item) {
    load_transition(loader, maps, Verdict{shared + L::kOutput}, item, item.value_head / (p.value_heads / p.heads),
                    count++);
  };
  if (after_shares) {
    LeftOver left;
    while (take_left_over(p, arguments.shares, kTransitionTicketWord, 2 * (arguments.segmented.segments - 1), left))
      load_item(transition_of(arguments.segmented, left.sequence, left.value_head, left.within / 2, left.within % 2));
  } else {
    for (int index = blockIdx.x, next; index < items; index = next) {
      next = p.cu_seqlens ? int(gridDim.x) + atomicAdd(ticket, 1) : index + int(gridDim.x);
      load_item(read_transition<kSegments>(arguments, index));
    }
  }
  loader.finish();
  if (after_shares) cudaGridDependencySynchronize();  // who waits for this pass waits for the shares
}

// Of all items of the block, or with kPublish of its only one, whose map other blocks of the grid read. `handover`: the
// barrier to arrive at when there are no more stages to be read.
template <typename L, bool kSegments, bool kPublish, typename SomeArguments>
__device__ __forceinline__ void scan_transitions(const SomeArguments& arguments, uint32_t shared, Barriers barriers,
                                                 uint32_t handover) {
  using cute::SM90::GMMA::Major;
  using cute::SM90::GMMA::ScaleOut;
  // Squares that a few chunks of the same kind would not bring down to that.
  constexpr float kHopelessSquares = 2.44140625e-4f;  // 2^-12
  const auto& p = arguments.p;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int pair = lane % 4 * 2;
  uint32_t pair_decays = shared + L::kFactors + kDecayOffset + lane % 4 * 16;
  keep(pair_decays);
  const Verdict verdict{shared + L::kOutput};
  int turn = 0;

  float map[2][32], offset[2][32];  // R^T, halves of its columns; B^T, halves of V
  uint32_t copy[32];
  Cursor<L::kStages> cursor(0);
  mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
  for (;;) {
    const uint32_t info = shared + L::kFactors + cursor.stage * kFactorBytes + kChunkInfoOffset;
    const uint4 where = load_shared<uint4>(info);
    const uint4 what = load_shared<uint4>(info + offsetof(ChunkInfo, left));
    if (int(what.x) == kStop) {
      if constexpr (kPublish) mbarrier_arrive(handover);
      break;
    }
    const int chunks = load_shared<int>(info + offsetof(ChunkInfo, chunks));
    const int item = load_shared<int>(info + offsetof(ChunkInfo, item));
    const int row = int(what.y) * 64 + warp * 16 + lane / 4;  // and row + 8

#pragma unroll
    for (int j = 0; j < 64; ++j) {
      const int column = j / 4 * 8 + pair + j % 2;
      map[j / 32][j % 32] = column == row + j / 2 % 2 * 8 ? 1.f : 0.f;
      offset[j / 32][j % 32] = 0.f;
    }
    if (chunks > 0) {
      copy_and_decay(map, copy, pair_decays + cursor.stage * kFactorBytes);
    }

    bool forgotten = false;
    int done = 0, next_look = 1;
    // B's products of a chunk run beside the next one's first.
    uint32_t packed[4] = {};
    uint32_t stage = cursor.stage;
    const auto values_at = [&](uint32_t stage) {
      return swizzled_128b(shared + stage * L::kStageBytes + TransitionStage<L>::value_offset(0));
    };
    const auto add_offset = [&](cute::GmmaDescriptor values) {
      wgmma<Major::MN>(offset[0], packed, values);
      wgmma<Major::MN>(offset[1], packed,
                       moved(values, TransitionStage<L>::value_offset(1) - TransitionStage<L>::value_offset(0)));
      cute::warpgroup_commit_batch();
    };
    while (chunks > 0) {
      const cute::GmmaDescriptor tiles = swizzled_128b(shared + cursor.stage * L::kStageBytes);
      const cute::GmmaDescriptor system =
          mn_major_plain(shared + L::kFactors + cursor.stage * kFactorBytes + kSolveOffset, 32);
      const uint32_t column_scale = shared + L::kFactors + cursor.stage * kFactorBytes + kColumnScaleOffset + pair * 4;
      float e[8], d[8];
      cute::warpgroup_arrive();
      multiply_copy(e, copy, moved(tiles, L::kGateOffset), kTileBytes, ScaleOut::Zero);
      cute::warpgroup_commit_batch();
      add_offset(values_at(stage));
      cute::warpgroup_wait<1>();

      uint32_t packed_e[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) packed_e[i] = pack_bf16(e[2 * i], e[2 * i + 1]);
#pragma unroll
      for (int i = 0; i < 8; ++i) d[i] = e[i];
      cute::warpgroup_arrive();
      wgmma<Major::MN>(d, packed_e, system);
      cute::warpgroup_commit_batch();
      const float2 c[2] = {load_shared<float2>(column_scale), load_shared<float2>(column_scale + 32)};
      cute::warpgroup_wait<0>();
      if (done > 0) mbarrier_arrive(barriers.empty(stage));
      stage = cursor.stage;
      cursor.advance(1);

#pragma unroll
      for (int i = 0; i < 4; ++i) packed[i] = pack_bf16(d[2 * i] * c[i / 2].x, d[2 * i + 1] * c[i / 2].y);
      cute::warpgroup_arrive();
      wgmma<Major::MN>(map[0], packed, moved(tiles, kKeyOffset));
      cute::warpgroup_commit_batch();
      wgmma<Major::MN>(map[1], packed, moved(tiles, kKeyOffset + 4096));
      cute::warpgroup_commit_batch();
      if (++done == chunks) {
        cute::warpgroup_wait<0>();
        break;
      }
      mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
      float4 decays[4];
      load_decays(decays, pair_decays + cursor.stage * kFactorBytes, 0);
      cute::warpgroup_wait<1>();
      copy_and_decay(map, copy, 0, decays);
      load_decays(decays, pair_decays + cursor.stage * kFactorBytes, 1);
      cute::warpgroup_wait<0>();
      copy_and_decay(map, copy, 1, decays);

      // Behind the first chunks until there is a verdict, then now and then. From the copy, since accumulators are out
      // of bounds in here, so once the next chunk is there: behind the last that comes without a verdict it would be
      // too late.
      if (done == next_look) {
        float squares = 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float x[8];
          unpack(x, copy + 4 * j, __nv_bfloat16{});
#pragma unroll
          for (int i = 0; i < 8; ++i) squares = fmaf(x[i], x[i], squares);
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
        if (lane == 0) store_shared(verdict.sums(turn) + warp * 4, squares);
        cutlass::arch::NamedBarrier::sync(128, 0);
        const float4 all = load_shared<float4>(verdict.sums(turn));
        turn ^= 1;
        squares = all.x + all.y + all.z + all.w;
        forgotten = squares <= kForgotten * kForgotten;
        const bool goes_on = done >= kTrialChunks - 1 || squares > kHopelessSquares;
        if ((forgotten || goes_on) && threadIdx.x == 0) atomicExch(verdict.word(), 2 * item + (forgotten ? 2 : 1));
        if (forgotten) break;
        next_look = goes_on ? (done / kChunksBetweenTrials + 1) * kChunksBetweenTrials : done + 1;
      }
    }
    if (chunks > 0) {
      cute::warpgroup_arrive();
      add_offset(values_at(stage));
      cute::warpgroup_wait<0>();
    } else {
      cursor.advance(1);
    }
    mbarrier_arrive(barriers.empty(stage));

    // What the loader had brought of this segment before it knew.
    for (;;) {
      mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
      const uint32_t next = shared + L::kFactors + cursor.stage * kFactorBytes + kChunkInfoOffset;
      if (load_shared<int>(next + offsetof(ChunkInfo, left)) == kStop ||
          load_shared<int>(next + offsetof(ChunkInfo, item)) != item)
        break;
      mbarrier_arrive(barriers.empty(cursor.stage));
      cursor.advance(1);
    }
    if constexpr (kPublish) mbarrier_arrive(handover);

    const int64_t head = int64_t(where.w) * p.value_heads + where.z;
    if constexpr (kSegments) {
      const SegmentArguments& to = arguments.segmented;
      const int64_t index = head * (to.segments - 1) + int(what.z);
      if (!forgotten) {
        char* rows = to.maps + index * kMapBytes + int(what.y) * (kMapBytes / 2) + row % 64 * 128 + pair * 2;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const int chunk = (j % 8 ^ lane / 4) * 16;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float* r = &map[j / 8][j % 8 * 4 + 2 * i];
            *reinterpret_cast<uint32_t*>(rows + j / 8 * (kMapBytes / 4) + i * 8 * 128 + chunk) = pack_fp16(r[0], r[1]);
          }
        }
        if constexpr (kPublish) fence_global_async();  // for other blocks' copy engines
      }
      store_offset(offset, to.offsets + index * kOffsetBytes, int(what.y) * 4 + warp, lane);
      const int status = forgotten ? kMapForgotten : kMapStored;
      if constexpr (kPublish) {
        cutlass::arch::NamedBarrier::sync(128, 0);
        if (!arguments.shares.words) cudaGridDependencySynchronize();  // the words are cleared
      }
      if (threadIdx.x == 0) store_release(&to.status[index * 2 + what.y], status);
      if constexpr (kPublish) return;
    } else {
      if (forgotten) {
#pragma unroll
        for (int j = 0; j < 64; ++j) map[j / 32][j % 32] = 0.f;
      }
      const int64_t first = head * (kHeadDim * kHeadDim) + first_element(!p.state_v_first, row, pair);
      store_state(map, p.map + first, !p.state_v_first);
      store_state(offset, p.offset + first, !p.state_v_first);
    }
  }
}

}  // namespace flashkda::chunk_kda_fwd
