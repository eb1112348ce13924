// Shares: a pass ahead of the others, for gates that forget. Each head's chunks are cut in pieces, as many as there are
// blocks. What a block begins within a sequence, it begins some chunks early, with a state of zeros: that is right
// where what these chunks do to the state that enters them, R of S' = S R + B, is zero for fp32. The block finds R
// first, by taking the rows of I through them in the place of a state.
//
// Where R is not zero it leaves its piece alone, and says so: the passes that come after take the whole head, as if
// there had been no shares. They run in any case, and have nothing to do where all was right.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>

#include "common/hopper.cuh"
#include "sm90/chunk_kda/loader.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda/state.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/items.cuh"

namespace flashkda::chunk_kda_fwd {

using namespace chunk_kda;

__device__ __forceinline__ int* head_word(const ChunkKdaParams& p, const ShareArguments& shares, int sequence,
                                          int value_head) {
  return shares.words + kHeadWords + sequence * p.value_heads + value_head;
}

// To the passes after, by one thread of a block that will not touch it.
__device__ __forceinline__ void leave_over(const ChunkKdaParams& p, const ShareArguments& shares, int sequence,
                                           int value_head) {
  const int head = sequence * p.value_heads + value_head;
  if (add_release(shares.words + kHeadWords + head, kLeftOver + 1) >= kLeftOver) return;  // it is in the list
  const int place = atomicAdd(shares.words + kListWord, 1);
  store_release(shares.words + kHeadWords + p.sequences * p.value_heads + place, head + 1);
}

template <typename L>
__device__ __forceinline__ Attempt attempt_of(uint32_t shared) {
  return {shared + L::kOutput + L::kAllOutputBytes - Attempt::kBytes};
}

// The block's piece. That of a packed call is read behind the plan; a dense one's grid is pieces, value heads,
// sequences.
__device__ __forceinline__ Piece read_piece(const Arguments& arguments) {
  const ChunkKdaFwdParams& p = arguments.p;
  const ShareArguments& shares = arguments.shares;
  if (p.cu_seqlens) return shares.packed_pieces[blockIdx.x];
  Piece piece;
  piece.sequence = blockIdx.z;
  piece.value_head = blockIdx.y;
  piece.chunk = blockIdx.x * shares.share;
  piece.begin = 0;
  piece.length = int(p.tokens);
  piece.count = min(shares.share, (piece.length + kChunk - 1) / kChunk - piece.chunk);
  return piece;
}

// The value head of the block's piece; negative for no piece. Of a packed call, waits for the plan.
__device__ __forceinline__ int head_of_block(const Arguments& arguments) {
  if (arguments.p.cu_seqlens) cudaGridDependencySynchronize();
  const Piece piece = read_piece(arguments);
  return piece.count > 0 ? piece.value_head : -1;
}

// The chunks of a piece, those that it begins early included.
struct Run {
  Item item;
  int head;    // of q and k
  int silent;  // first chunks without o
  int chunks;
  int tries;  // first chunks that decide
};

__device__ __forceinline__ Run make_run(const Arguments& arguments, const Piece& piece) {
  const ChunkKdaFwdParams& p = arguments.p;
  const int group = p.value_heads == p.heads ? 1 : p.value_heads / p.heads;
  Run run = {};
  run.silent = min(piece.chunk, arguments.shares.warm_up);
  run.chunks = run.silent + piece.count;
  run.head = group == 1 ? piece.value_head : piece.value_head / group;
  Item& item = run.item;
  item.batch = p.cu_seqlens ? 0 : piece.sequence;
  item.sequence = piece.sequence;
  item.value_head = piece.value_head;
  item.begin = piece.begin + (piece.chunk - run.silent) * kChunk;
  item.length = piece.begin + min((piece.chunk + piece.count) * kChunk, piece.length) - item.begin;
  // A piece that goes from start to end is right, and all there is to its head. One that goes from the start is tried,
  // too, or it would be in the way of the next pass.
  const bool from_start = run.silent == piece.chunk;
  const bool to_end = (piece.chunk + piece.count) * kChunk >= piece.length;
  run.tries = from_start && to_end ? 0 : min(arguments.shares.warm_up, run.chunks);
  item.flags = (run.tries > 0 ? kTried : 0) | (from_start ? kFromStart : 0) | (to_end ? kToEnd : 0);
  return run;
}

template <typename L>
__device__ __forceinline__ void issue_chunk(const Arguments& arguments, PrefillLoader<L>& loader, const Run& run,
                                            int chunk) {
  const Item& item = run.item;
  loader.issue({&arguments.q, &arguments.k, &arguments.v, &arguments.g}, item.batch, item.begin + chunk * kChunk,
               run.head, item.value_head, 0);
}

// As many as a verdict takes at least.
constexpr int kIssuedFirst = 2;

// Of the loader, as soon as there are barriers, while all other warps wait: has TMA bring the first chunks of a dense
// call. Returns how many.
template <typename L>
__device__ __forceinline__ int issue_first(const Arguments& arguments, const Block<L>& block) {
  if (arguments.p.cu_seqlens || arguments.p.pool.states) return 0;
  const Run run = make_run(arguments, read_piece(arguments));
  PrefillLoader<L> loader{block.shared, block.infos(), block.barriers};
  const int count = min(run.chunks, kIssuedFirst);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    issue_chunk<L>(arguments, loader, run, i);
    loader.cursor.advance(1);
  }
  return count;
}

template <typename L>
__device__ void load_share(const Arguments& arguments, const Block<L>& block, int issued) {
  const ChunkKdaFwdParams& p = arguments.p;
  const Attempt attempt = attempt_of<L>(block.shared);
  PrefillLoader<L> loader{block.shared, block.infos(), block.barriers};
  loader.count = issued;
  const Maps maps{&arguments.q, &arguments.k, &arguments.v, &arguments.g};
  if (issued == 0) prefetch(maps);
  attempt.init(arguments.shares.most_kept);

  // The words are cleared behind a wait that a dense call's first loads need not share; the next pass, which reads
  // them, is not to begin before that.
  bool may_count = false;
  const auto allow_counting = [&] {
    if (may_count) return;
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
    may_count = true;
  };
  if (p.cu_seqlens) allow_counting();  // the plan
  const Piece piece = read_piece(arguments);
  const int64_t row = p.pool.states && piece.count > 0 ? pool_row(p.pool, piece.sequence) : 0;
  if (row < 0 && !p.cu_seqlens) {  // padding; of packed calls the next pass looks for it
    allow_counting();
    leave_over(p, arguments.shares, piece.sequence, piece.value_head);
  } else if (row >= 0 && piece.count > 0) {
    const Run run = make_run(arguments, piece);
    const Item& item = run.item;
    StatePlaces states;
    for (int i = 0; i < run.chunks; ++i) {
      ChunkInfo* info = loader.next_info();
      // What has been issued has to be armed.
      if (run.tries > 0 && i >= max(run.tries, issued) && atomicOr(attempt.word(), 0) == Attempt::kWrong) break;
      if (i >= issued) issue_chunk<L>(arguments, loader, run, i);
      if (i == 0) states = fetch_states(p, item, row);
      describe(info, item, item.begin + i * kChunk, item.length - i * kChunk,
               item.flags | (i < run.tries ? kWarmsUp : 0), run.silent, states);
      info->item = run.tries;
      loader.arm(maps);
      if (i + 1 >= run.tries) allow_counting();
    }
  }
  allow_counting();
  loader.finish();
}

// All scan threads, ahead of the block's piece. Where that is left alone, its stages are behind the cursor.
template <typename L>
__device__ __forceinline__ void try_piece(const Arguments& arguments, uint32_t shared, Barriers barriers,
                                          Cursor<L::kStages>& cursor) {
  using cute::SM90::GMMA::Major;
  using cute::SM90::GMMA::ScaleOut;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, pair = lane % 4 * 2;
  const Attempt attempt = attempt_of<L>(shared);
  const auto info_of = [&](const Cursor<L::kStages>& at) {
    return shared + L::kFactors + at.stage * kFactorBytes + kChunkInfoOffset;
  };
  mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
  const uint4 where = load_shared<uint4>(info_of(cursor));
  const int left = load_shared<int>(info_of(cursor) + offsetof(ChunkInfo, left));
  const bool tried = left != kStop && load_shared<int>(info_of(cursor) + offsetof(ChunkInfo, flags)) & kTried;
  int* const verdicts = arguments.shares.words;
  if (thread == 0) cudaGridDependencySynchronize();  // the words are cleared
  if (!tried) {
    if (thread == 0) add_release(verdicts, 1);
    return;
  }
  const int tries = load_shared<int>(info_of(cursor) + offsetof(ChunkInfo, item));
  Cursor<L::kStages> at = cursor;
  for (int i = 0; i < tries; ++i, at.advance(1)) mbarrier_wait(barriers.ready(at.stage), at.parity);
  // Of all its transform warps, which are done with these chunks.
  bool right = !attempt.give_up(false);
  float kept = 1.f;  // of R at most
  at = cursor;
  for (int i = 0; i < tries; ++i, at.advance(1)) kept *= load_shared<float>(info_of(at) + offsetof(ChunkInfo, kept));
  if (right && !(kept <= kForgotten)) {
    float rows[2][32];  // of R, which begin as rows of I
    uint32_t copy[32];
    const int row = warp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 64; ++j) {
      rows[j / 32][j % 32] = j / 4 * 8 + pair + j % 2 == row + j / 2 % 2 * 8 ? 1.f : 0.f;
    }
    at = cursor;
#pragma unroll 1
    for (int i = 0; i < tries; ++i, at.advance(1)) {
      const uint32_t stage = shared + at.stage * L::kStageBytes;
      const uint32_t factors = shared + L::kFactors + at.stage * kFactorBytes;
      copy_and_decay(rows, copy, factors + kDecayOffset + lane % 4 * 16);
      float w[8];
      const cute::GmmaDescriptor keys = swizzled_128b(stage + kKeyOffset);
      cute::warpgroup_arrive();
      multiply_copy(w, copy, keys, 4096, ScaleOut::Zero);
      cute::warpgroup_commit_batch();
      const float2 c[2] = {load_shared<float2>(factors + kColumnScaleOffset + pair * 4),
                           load_shared<float2>(factors + kColumnScaleOffset + pair * 4 + 32)};
      cute::warpgroup_wait<0>();
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        w[2 * j] *= c[j / 2].x;
        w[2 * j + 1] *= c[j / 2].y;
        packed[j] = pack_bf16(w[2 * j], w[2 * j + 1]);
      }
      cute::warpgroup_arrive();
      wgmma<Major::K>(w, packed, k_major_plain(factors + kSolveOffset, 32));
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      uint32_t u[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) u[j] = pack_bf16(w[2 * j], w[2 * j + 1]);
      cute::warpgroup_arrive();
      wgmma<Major::MN>(rows[0], u, swizzled_128b(stage + L::kGateOffset));
      wgmma<Major::MN>(rows[1], u, swizzled_128b(stage + L::kGateOffset + kTileBytes));
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
    }
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < 64; ++j) squares = fmaf(rows[j / 32][j % 32], rows[j / 32][j % 32], squares);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
    if (lane == 0) store_shared(attempt.sums() + warp * 4, squares);
    cutlass::arch::NamedBarrier::sync(4 * L::kScans * 32, 0);
    const float4 low = load_shared<float4>(attempt.sums()), high = load_shared<float4>(attempt.sums() + 16);
    const float sum = low.x + low.y + low.z + low.w + high.x + high.y + high.z + high.w;
    right = sum <= kForgotten * kForgotten;
  }
  if (thread == 0) {
    atomicExch(attempt.word(), right ? Attempt::kRight : Attempt::kWrong);
    if (!right) leave_over(arguments.p, arguments.shares, int(where.w), int(where.z));
    if (!right) __threadfence();  // what it leaves over is known before that it is known
    atomicAdd(verdicts, right ? 1 : kLeftOver + 1);
  }
  if (right) return;
  // What the loader had brought of it before it knew.
  for (;;) {
    mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
    if (load_shared<int>(info_of(cursor) + offsetof(ChunkInfo, left)) == kStop ||
        !(load_shared<int>(info_of(cursor) + offsetof(ChunkInfo, flags)) & kTried))
      break;
    mbarrier_arrive(barriers.empty(cursor.stage));
    cursor.advance(1);
  }
}

// ---- the pass that comes after

// Whether it is known that nothing is left.
__device__ __forceinline__ bool all_shares_right(const ShareArguments& shares) {
  return load_acquire(shares.words) == shares.all_right;
}

// An item of a head that is left over.
struct LeftOver {
  int sequence;
  int value_head;
  int within;  // the head's items
};

// Takes the next item that no block has, where each head has so many. Blocks of that pass begin when they find room,
// which may be late. Waits until there is one or it is known that there is none, which it returns false for.
__device__ __forceinline__ bool take_left_over(const ChunkKdaParams& p, const ShareArguments& shares, int ticket_word,
                                               int items_a_head, LeftOver& left) {
  const int ticket = atomicAdd(shares.words + ticket_word, 1);
  const int place = ticket / items_a_head;
  if (place >= p.sequences * p.value_heads) return false;
  int* const entry = shares.words + kHeadWords + p.sequences * p.value_heads + place;
  int head;
  while ((head = load_acquire(entry) - 1) < 0) {
    const bool all_known = (load_acquire(shares.words) & (kLeftOver - 1)) == shares.grid;
    if (all_known && load_acquire(shares.words + kListWord) <= place) return false;
    __nanosleep(50);
  }
  left.sequence = head / p.value_heads;
  left.value_head = head - left.sequence * p.value_heads;
  left.within = ticket - place * items_a_head;
  return true;
}

// Until all who began with pieces of a head are done with them: they write the same rows of o.
__device__ __forceinline__ void wait_for_pieces(const ChunkKdaParams& p, const ShareArguments& shares,
                                                const LeftOver& left) {
  int pieces = shares.pieces;
  if (p.cu_seqlens) {
    const int* offsets = packed_offsets(p.workspace, p.sequences);
    const int chunks = (offsets[left.sequence + 1] - offsets[left.sequence] + kChunk - 1) / kChunk;
    const int share = shares.words[kShareWord];
    pieces = (chunks + share - 1) / share;
  }
  int* const word = head_word(p, shares, left.sequence, left.value_head);
  while ((load_acquire(word) & (kLeftOver - 1)) < pieces) __nanosleep(50);
}

}  // namespace flashkda::chunk_kda_fwd
