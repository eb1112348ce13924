// What a packed call in shares works out on the device before its passes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/warp.cuh"
#include "params.h"
#include "sm90/chunk_kda/config.h"
#include "sm90/chunk_kda/plan.cuh"
#include "sm90/chunk_kda_fwd/config.h"

namespace flashkda::chunk_kda_fwd {

constexpr int kPlanSharesThreads = 128;

// One block. Leaves cu_seqlens as plan.cuh's kernel does, but no order; the pieces of the blocks; and the words, zero
// but for the share, and for the first one where a sequence is empty: that is left over. The share is the least with
// which there are no more pieces than blocks.
template <typename Offset>
__global__ void __launch_bounds__(kPlanSharesThreads)
    plan_shares_kernel(const Offset* cu_seqlens, int sequences, int value_heads, int tokens, int grid, int* offsets,
                       Piece* pieces, int* words, int word_count) {
  __shared__ int clean[kMostSharedSequences + 1];
  __shared__ int before[kMostSharedSequences + 1];  // of pieces of a value head, sequences before
  cudaTriggerProgrammaticLaunchCompletion();
  const int thread = threadIdx.x, lane = thread % 32;
  if (thread < 32) {
    int carry = 0, longest = 0, total = 0;
    bool is_empty = false;
    for (int first = 0; first <= sequences; first += 32) {
      const int i = first + lane;
      int x = i <= sequences ? chunk_kda::clamped_offset(cu_seqlens[i], tokens) : 0;
      x = max(warp_running(x, lane, [](int a, int b) { return max(a, b); }), carry);
      const int left = __shfl_up_sync(0xffffffffu, x, 1);
      const int length = i == 0 || i > sequences ? 0 : x - (lane == 0 ? carry : left);
      is_empty |= i > 0 && i <= sequences && length == 0;
      const int chunks = (length + kChunk - 1) / kChunk;
      longest = max(longest, chunks);
      total += chunks;
      carry = __shfl_sync(0xffffffffu, x, 31);
      if (i <= sequences) clean[i] = x;
    }
    longest = __reduce_max_sync(0xffffffffu, longest);
    total = __reduce_add_sync(0xffffffffu, total);
    is_empty = __any_sync(0xffffffffu, is_empty);
    __syncwarp();
    const auto chunks_of = [&](int i) { return (clean[i + 1] - clean[i] + kChunk - 1) / kChunk; };
    const auto count = [&](int share) {
      int pieces = 0;
      for (int i = lane; i < sequences; i += 32) pieces += (chunks_of(i) + share - 1) / share;
      return __reduce_add_sync(0xffffffffu, pieces) * value_heads;
    };
    int low = max(int((int64_t(total) * value_heads + grid - 1) / grid), 1), high = max(longest, low);
    while (low < high) {
      const int middle = (low + high) / 2;
      if (count(middle) <= grid) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    int sum = 0;
    for (int first = 0; first < sequences; first += 32) {
      const int i = first + lane;
      const int own = i < sequences ? (chunks_of(i) + low - 1) / low : 0;
      const int upto = sum + warp_running(own, lane, [](int a, int b) { return a + b; });
      if (i < sequences) before[i] = upto - own;
      sum = __shfl_sync(0xffffffffu, upto, 31);
    }
    if (lane == 0) {
      before[sequences] = sum;
      words[kShareWord] = low;
      words[0] = is_empty ? kLeftOver : 0;
    }
  }
  for (int i = 1 + thread; i < word_count; i += kPlanSharesThreads) {
    if (i != kShareWord) words[i] = 0;
  }
  __syncthreads();
  for (int i = thread; i <= sequences; i += kPlanSharesThreads) offsets[i] = clean[i];
  const int share = words[kShareWord];
  for (int block = thread; block < grid; block += kPlanSharesThreads) {
    Piece piece = {};
    if (block < before[sequences] * value_heads) {
      int sequence = 0;
      while (before[sequence + 1] * value_heads <= block) ++sequence;
      const int within = block - before[sequence] * value_heads, count = before[sequence + 1] - before[sequence];
      const int length = clean[sequence + 1] - clean[sequence], chunks = (length + kChunk - 1) / kChunk;
      piece.sequence = sequence;
      piece.value_head = within / count;
      piece.chunk = (within - piece.value_head * count) * share;
      piece.count = min(share, chunks - piece.chunk);
      piece.begin = clean[sequence];
      piece.length = length;
    }
    pieces[block] = piece;
  }
}

inline cudaError_t launch_plan_shares(const ChunkKdaParams& p, const Plan& plan, cudaStream_t stream) {
  char* const workspace = static_cast<char*>(p.workspace);
  int* const offsets = reinterpret_cast<int*>(workspace + chunk_kda::plan_layout(p.sequences).offsets);
  Piece* const pieces = reinterpret_cast<Piece*>(workspace + plan.shares.pieces);
  int* const words = reinterpret_cast<int*>(workspace + plan.shares.words);
  const int word_count = int((plan.shares.words_end - plan.shares.words) / sizeof(int));
  const auto launch = [&](const auto* cu_seqlens) {
    plan_shares_kernel<<<1, kPlanSharesThreads, 0, stream>>>(cu_seqlens, p.sequences, p.value_heads, int(p.tokens),
                                                             plan.shares_grid, offsets, pieces, words, word_count);
    return cudaGetLastError();
  };
  return p.cu_seqlens_is_64bit ? launch(static_cast<const int64_t*>(p.cu_seqlens))
                               : launch(static_cast<const int32_t*>(p.cu_seqlens));
}

}  // namespace flashkda::chunk_kda_fwd
