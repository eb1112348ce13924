// Everything the host decides, from shapes and the number of multiprocessors alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "sm90/chunk_kda/config.h"

namespace flashkda::chunk_kda_fwd {

using chunk_kda::kChunk;
using chunk_kda::kHeadDim;

// Fewer chunks do not pay for a segment.
constexpr int kMinSegmentChunks = 4;
constexpr int kMaxSegments = 32;
// The maps of segments take at most one of so many of the bytes of q, k, v and g, where these have 16 bits and no
// grouped heads.
constexpr int kMapsPart = 10;
// Of shares.
constexpr int kMostWarmUpChunks = 6;
constexpr int kMostSharedSequences = 128;
// |R|, of S' = S R + B: what is left of a state 2^-24 times as large as before is below its fp32 rounding.
constexpr float kForgotten = 5.9604644775390625e-8f;  // 2^-24

// What a segment does to the state that enters it: S' = S R + B. R^T is [128 of S'][128 of S] in fp16, as the prefill
// multiplies with it: byte of (j, c): j / 64 * 16384 + c / 64 * 8192 + j % 64 * 128 + ((c % 64 / 8) ^ (j % 8)) * 16 + c
// % 8 * 2. B is as offset.cuh has it.
constexpr int kMapBytes = 2 * kHeadDim * kHeadDim;
constexpr int kOffsetBytes = 2 * kHeadDim * kHeadDim + kHeadDim / 16 * 512;

// The workspace of a call in segments. Indices of heads run over [sequences][value_heads], those of segments over all
// but the last.
struct SegmentLayout {
  size_t maps = 0;     // [heads][segments - 1][kMapBytes]
  size_t offsets = 0;  // [heads][segments - 1][kOffsetBytes]
  size_t status = 0;   // int32 [heads][segments - 1][2]: of halves of the rows of R^T and B^T
  size_t bytes = 0;
};
constexpr int kMapPending = 0, kMapStored = 1, kMapForgotten = 2;  // forgotten: these rows of R^T are zero

inline SegmentLayout segment_layout(int64_t heads, int segments) {
  SegmentLayout layout;
  const size_t maps = size_t(heads) * size_t(segments - 1);
  layout.offsets = layout.maps + maps * kMapBytes;
  layout.status = layout.offsets + maps * kOffsetBytes;
  layout.bytes = layout.status + maps * 2 * sizeof(int32_t);
  return layout;
}

struct SegmentArguments {
  int segments;        // of each sequence
  int segment_chunks;  // chunks of a segment; the last one may have fewer
  // As SegmentLayout has them.
  char* maps;
  char* offsets;
  int* status;
};

// What a call in shares has beside the rest, at multiples of 16 bytes.
struct ShareLayout {
  size_t words = 0;  // int32 [kHeadWords + 2 heads]
  size_t words_end = 0;
  size_t pieces = 0;  // of a packed call: Piece [blocks]
};
struct alignas(16) Piece {
  int sequence;
  int value_head;
  int chunk;   // its first, of the sequence
  int count;   // chunks; 0 for no piece
  int begin;   // of the sequence, in tokens
  int length;  // of the sequence
};
// The words: how many blocks know of their piece; tickets of the passes that come after; how many heads are left over;
// of a packed call, the share; of each head, how many blocks are done with their piece; the heads that are left over,
// from 1 on.
constexpr int kTicketWord = 1, kTransitionTicketWord = 2, kListWord = 3, kShareWord = 4, kHeadWords = 5;
// In those that count blocks: something is left over to the passes after.
constexpr int kLeftOver = 1 << 20;

struct ShareArguments {
  int* words;                  // as ShareLayout has them; null for no shares
  const Piece* packed_pieces;  // the same; null of dense calls
  int share;                   // chunks, of dense calls
  int pieces;                  // a head, of dense calls
  int grid;
  int all_right;    // what the first word comes to where nothing is left; negative if it cannot tell
  int warm_up;      // chunks
  float most_kept;  // of a channel over one of those chunks, above which the rest is not expected to make up for it
};

// Where a state of a pool is to be left on the way: behind so many tokens of its sequence, in that row.
struct Checkpoint {
  int tokens;
  int row;
};
constexpr int kNoCheckpoint = INT32_MAX;  // tokens; behind those of a sequence that are left

// Whether sequences are cut in segments, and where their maps are found: by a grid ahead of the prefill's, or, where
// blocks take halves of heads, by the blocks that take the same segments in the prefill. Or the pass ahead of any of
// these in which all blocks take equal shares.
enum class Cut { kWhole, kMapsAhead, kMapsFirst, kShares };
constexpr bool in_segments(Cut cut) { return cut == Cut::kMapsAhead || cut == Cut::kMapsFirst; }

struct Plan {
  int scans;           // halves of a value head's V that a block takes
  int segments;        // of each sequence
  int segment_chunks;  // chunks of a segment; the last one may have fewer
  int grid;
  Cut cut;
  int transition_grid;  // with kMapsAhead
  int shares_grid;      // of the pass in shares ahead of all that; 0 for none
  int share;            // its chunks a block, of dense calls
  int pieces;           // its blocks a head, of dense calls
  int warm_up;          // its chunks
  ShareLayout shares;
  // For states in a pool, in the workspace: the checkpoints of each sequence in order, or, of calls in segments, copies
  // of the initial states.
  size_t pool_offset;
  size_t workspace_bytes;

  // A block may be done with the last of a sequence before another begins with its first.
  bool copies_initial_states() const { return segments > 1 || shares_grid > 0; }
};

// Nanoseconds on an H100, as measured (docs/kernel_notes.md).
constexpr int64_t kScanNs[3] = {0, 735, 1050};  // of a chunk, by `scans`
constexpr int64_t kTransitionNs = 750;          // of a chunk
constexpr int64_t kMapNs = 1300;                // of taking a state through one segment
constexpr int64_t kTogetherNs = 5000;           // of transitions in a grid ahead that runs beside the prefill's
constexpr int64_t kFirstNs = 9500;              // of transitions in the blocks of the prefill
constexpr int64_t kAheadNs = 12000;             // of transitions in a grid ahead that does not
constexpr int64_t kRoundNs = 12000;             // of each further item of a block of theirs
constexpr int64_t kSharesNs = 4000;             // of shares, beside their chunks
constexpr int64_t kLeastGainNs = 2500;          // with fast gates, for what slow ones lose
constexpr int64_t kVerdictNs = 5000;            // what these lose
constexpr int64_t kVerdictParts = 10;           // of a whole sequence, at most one of so many

constexpr size_t align_16(size_t bytes) { return (bytes + 15) / 16 * 16; }

// With one_segment, how a sequence is computed depends on nothing but itself.
inline Plan plan(int sequences, int value_heads, int64_t tokens, bool has_cu_seqlens, bool one_segment, int sm_count,
                 bool has_pool, int checkpoints) {
  const int64_t heads = int64_t(sequences) * value_heads;
  const int64_t chunks = tokens > kChunk ? (tokens + kChunk - 1) / kChunk : 1;
  Plan plan = {};
  // Half a head is a shorter step, at the price of transforming every chunk twice: for heads that leave blocks idle.
  plan.scans = 2 * heads <= sm_count ? 1 : 2;
  plan.cut = Cut::kWhole;
  plan.segments = 1;
  plan.segment_chunks = int(chunks);

  const auto rounds = [&](int64_t blocks) { return (blocks + sm_count - 1) / sm_count; };
  const bool may_cut = !one_segment && checkpoints == 0;
  // With fast gates. Packed sequences are taken for equally long ones, which they seldom are.
  const int64_t mean_chunks = has_cu_seqlens ? (chunks + sequences - 1) / std::max(sequences, 1) : chunks;
  int64_t fast = rounds((3 - plan.scans) * heads) * mean_chunks * kScanNs[plan.scans];
  if (has_cu_seqlens && sequences > 1) fast += fast / 4;

  // The segments that take least with slow gates, whose transitions run to the end and whose states go through all of
  // them, and with fast ones, `fast_ones` times, with one head's maps in so many bytes. Returns the time with fast
  // gates.
  const auto choose_segments = [&](int64_t fast_ones, int64_t most_map_bytes) {
    const int64_t whole = chunks * kScanNs[1];
    plan.scans = 1;
    plan.cut = Cut::kWhole;
    plan.segments = 1;
    plan.segment_chunks = int(chunks);
    int64_t least = (1 + fast_ones) * whole, fast = whole;
    for (int64_t wanted = 2; wanted <= kMaxSegments && wanted * kMinSegmentChunks <= chunks; ++wanted) {
      const int64_t segment_chunks = (chunks + wanted - 1) / wanted;
      const int64_t segments = (chunks + segment_chunks - 1) / segment_chunks;
      const int64_t transitions = 2 * heads * (segments - 1);
      if ((segments - 1) * (kMapBytes + kOffsetBytes) > most_map_bytes) break;
      const int64_t transition_rounds = rounds(transitions);
      const int64_t slow = transition_rounds * segment_chunks * kTransitionNs + (segments - 1) * kMapNs;
      for (int scans = 1; scans <= 2; ++scans) {
        const int64_t blocks = (3 - scans) * heads * segments;
        const bool together = transitions + blocks <= sm_count;
        const bool first = scans == 1 && !together;
        if (first && blocks > sm_count) continue;  // blocks wait for each other
        const int64_t before = together ? kTogetherNs
                               : first  ? kFirstNs
                                        : kAheadNs + (transition_rounds - 1) * kRoundNs;
        const int64_t of_segments = rounds(blocks) * segment_chunks * kScanNs[scans] + before;
        const int64_t ns = (1 + fast_ones) * of_segments + slow;
        if (ns >= least) continue;
        least = ns;
        fast = of_segments;
        plan.scans = scans;
        plan.cut = first ? Cut::kMapsFirst : Cut::kMapsAhead;
        plan.segments = int(segments);
        plan.segment_chunks = int(segment_chunks);
      }
    }
    return fast;
  };
  const bool is_dense_with_room = !has_cu_seqlens && may_cut && 2 * heads <= sm_count;
  const int64_t most_map_bytes = chunks * (kChunk * 4 * kHeadDim * 2) / kMapsPart;
  // Which gates a call has is not known here, so both count alike.
  if (is_dense_with_room) fast = choose_segments(1, INT64_MAX);

  // Where heads are left over, the passes after are to find as many blocks free: so these take halves or segments of
  // them.
  if (may_cut && heads > 0 && 2 * heads <= sm_count && sequences <= kMostSharedSequences) {
    const int64_t share = (mean_chunks + sm_count / heads - 1) / (sm_count / heads);
    const int64_t warm_up = std::min<int64_t>(2 + share / 96, kMostWarmUpChunks);
    // Whole sequences are to be so long that what slow gates lose is little of it.
    const bool is_long = plan.segments > 1 || has_cu_seqlens || fast >= kVerdictParts * kVerdictNs;
    if (chunks > warm_up && is_long && (share + warm_up) * kScanNs[2] + kSharesNs + kLeastGainNs < fast) {
      plan.share = int(share);
      plan.warm_up = int(warm_up);
      plan.pieces = int((chunks + share - 1) / share);
      plan.shares_grid = has_cu_seqlens ? sm_count : int(heads) * plan.pieces;
    }
  }

  // Behind shares, fast gates need no segments.
  if (is_dense_with_room) choose_segments(plan.shares_grid > 0 ? 0 : 1, most_map_bytes);
  if (plan.shares_grid > 0 && plan.cut == Cut::kMapsAhead && plan.scans == 1)
    plan.cut = Cut::kMapsFirst;  // one launch less
  const int64_t blocks = (3 - plan.scans) * heads * plan.segments;
  // A packed call may have padding rows to clear, whatever its sequences hold, so it never runs with few blocks.
  plan.grid = has_cu_seqlens || blocks > sm_count ? sm_count : int(blocks);
  if (plan.segments > 1) {
    const int64_t transitions = 2 * heads * (plan.segments - 1);
    if (plan.cut == Cut::kMapsAhead) plan.transition_grid = int(transitions < sm_count ? transitions : sm_count);
    plan.workspace_bytes = segment_layout(heads, plan.segments).bytes;
  }
  if (has_cu_seqlens) plan.workspace_bytes = chunk_kda::plan_layout(sequences).bytes;
  if (plan.shares_grid > 0) {
    plan.shares.words = align_16(plan.workspace_bytes);
    plan.shares.words_end = plan.shares.words + sizeof(int32_t) * (kHeadWords + 2 * size_t(heads));
    plan.shares.pieces = align_16(plan.shares.words_end);
    plan.workspace_bytes = plan.shares.pieces + (has_cu_seqlens ? sizeof(Piece) * size_t(sm_count) : 0);
  }
  if (checkpoints > 0 || (has_pool && plan.copies_initial_states())) {
    plan.pool_offset = align_16(plan.workspace_bytes);
    plan.workspace_bytes =
        plan.pool_offset + (checkpoints > 0 ? sizeof(Checkpoint) * size_t(sequences) * size_t(checkpoints)
                                            : sizeof(float) * size_t(heads) * kHeadDim * kHeadDim);
  }
  return plan;
}

}  // namespace flashkda::chunk_kda_fwd
