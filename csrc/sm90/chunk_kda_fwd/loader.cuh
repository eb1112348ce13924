// The loader of a prefill.
#pragma once

#include "sm90/chunk_kda/loader.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/items.cuh"
#include "sm90/chunk_kda_fwd/shares.cuh"
#include "sm90/chunk_kda_fwd/transition.cuh"

namespace flashkda::chunk_kda_fwd {

// The runs of an item: up to each checkpoint, then to the end.
template <typename L>
__device__ __forceinline__ void load_item(const Arguments& arguments, PrefillLoader<L>& loader, const Maps& maps,
                                          Item item) {
  const ChunkKdaFwdParams& p = arguments.p;
  const int head = item.value_head / (p.value_heads / p.heads);
  StatePlaces states = {};
  int flags = item.flags, padding = 0;
  const int64_t row = p.pool.states ? pool_row(p.pool, item.sequence) : 0;
  if (row < 0) {
    flags = kPadding | kFromStart;
    padding = item.length;
    item.length = 0;
  } else {
    states = fetch_states(p, item, row);
  }
  const Checkpoint* checkpoint = arguments.checkpoints + int64_t(item.sequence) * p.pool.checkpoints;
  int checkpoints = p.pool.checkpoints, done = 0;
  bool is_last;
  do {
    is_last = checkpoints == 0 || checkpoint->tokens > item.length;
    const int length = (is_last ? item.length : checkpoint->tokens) - done;
    void* const final_state = is_last ? states.final : pool_state(p, checkpoint->row, item.value_head);
    const int chunks = length > 0 ? (length + kChunk - 1) / kChunk : 1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ChunkInfo* info = loader.next_info();
      const int token = item.begin + done + chunk * kChunk;
      describe(info, item, token, length - chunk * kChunk, flags, padding, {states.initial, final_state});
      if (length > 0) {
        loader.load(maps, item.batch, token, head, item.value_head, item.part);
      } else {
        loader.skip();
      }
    }
    done += length;
    flags = kContinues;
    ++checkpoint;
    --checkpoints;
  } while (!is_last);
}

// Of the items of a block; with kMapsFirst one, of whose segment the transition comes first.
template <typename L, Cut kCut>
__device__ void load(const Arguments& arguments, const Block<L>& block) {
  constexpr bool kSegments = in_segments(kCut);
  constexpr int kHalves = 3 - L::kScans;
  const ChunkKdaFwdParams& p = arguments.p;
  const int segments = arguments.segmented.segments;
  const int items = p.sequences * p.value_heads * kHalves * segments;
  const bool after_shares = arguments.shares.words;
  PrefillLoader<L> loader{block.shared, block.infos(), block.barriers};
  const Maps maps{&arguments.q, &arguments.k, &arguments.v, &arguments.g};
  prefetch(maps);

  LeftOver left;
  const auto take = [&](Item& item) {
    const bool found = take_left_over(p, arguments.shares, kTicketWord, kHalves * segments, left);
    if (found) {
      item =
          make_item<kSegments>(arguments, left.sequence, left.value_head, left.within / kHalves, left.within % kHalves);
    }
    return found;
  };
  if constexpr (kCut == Cut::kMapsFirst) {
    Item item;
    bool found = true;
    if (after_shares) {
      found = take(item);
    } else {
      item = read_item<L::kScans, kSegments>(arguments, blockIdx.x);
    }
    Loader<TransitionStage<L>> first{block.shared, block.infos(), block.first_barriers()};
    if (found && !(item.flags & kToEnd)) {
      const TransitionItem transition{item.part,       item.segment, item.batch, item.sequence,
                                      item.value_head, item.begin,   item.length};
      load_transition(first, maps, Verdict{block.shared + L::kOutput}, transition,
                      item.value_head / (p.value_heads / p.heads), 0);
    }
    first.finish();
    mbarrier_wait_patiently(block.handover(), 0);
    if (found && after_shares) wait_for_pieces(p, arguments.shares, left);
    if (found) load_item(arguments, loader, maps, item);
  } else if (after_shares) {
    for (Item item; take(item);) {
      wait_for_pieces(p, arguments.shares, left);
      load_item(arguments, loader, maps, item);
    }
    // Sequences that shares do not see: those without tokens or without a row.
    for (int index = blockIdx.x; p.cu_seqlens && index < items; index += gridDim.x) {
      const int head = index / kHalves, sequence = head / p.value_heads;
      const Item item = make_item<kSegments>(arguments, sequence, head - sequence * p.value_heads, 0, index % kHalves);
      if (item.length == 0 || (p.pool.states && pool_row(p.pool, item.sequence) < 0))
        load_item(arguments, loader, maps, item);
    }
  } else {
    if constexpr (!kSegments) cudaGridDependencySynchronize();  // the plan
    // Sequences of a dense batch are equally long, so dealing them round is as good as tickets.
    int* ticket = static_cast<int*>(p.workspace);
    for (int index = blockIdx.x, next; index < items; index = next) {
      next = p.cu_seqlens ? int(gridDim.x) + atomicAdd(ticket, 1) : index + int(gridDim.x);
      load_item(arguments, loader, maps, read_item<L::kScans, kSegments>(arguments, index));
    }
  }
  loader.finish();
  if (after_shares) cudaGridDependencySynchronize();  // who waits for this pass waits for the shares
}

}  // namespace flashkda::chunk_kda_fwd
