// Scans over chunks for Hopper: one block a multiprocessor, one (sequence, value head) or a part of one at a time, 16
// tokens a chunk.
//
// A ring of shared-memory stages, one a chunk, passes through three roles:
//
//   loader     (1 thread)           takes work items and has TMA bring q, k, g, v of their chunks, as many ahead as
//                                   there are stages
//   transform  (7 or 11 warps)      a warp owns a chunk: it turns q, k, g in place into Qd, Kd, Kr, and solves the
//                                   16x16 system
//   scan       (1 or 2 warpgroups)  64 rows of V each: carries an fp32 state through the chunks in registers
//
// With G the cumulative log decay inside the chunk, n_k and n_q the norms that q and k are divided by (1 without
// normalisation), and k, q raw, the transform leaves
//
//   Kd = k exp(G)     Ki = k exp(-G)     Kr = k exp(G_last - G)     Qd = q exp(G)     d = diag(exp(G_last))
//   P  = lower(Qd Ki^T)
//   c  = diag(beta) / n_k^2
//   A  = (I + L)^-1, with L the part below the diagonal of c Kd Ki^T
//
// and the scans (chunk_kda_fwd/scan.cuh and transition.cuh, chunk_kda_bwd/states.cuh) say what becomes of them.
// Normalisation costs nothing an element: it is in c and in one factor a token. A has ones on its diagonal: it leaves
// less I, which is added in fp32, as c is multiplied.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "common/elements.cuh"
#include "common/hopper.cuh"
#include "params.h"
#include "sm90/chunk_kda/config.h"

namespace flashkda::chunk_kda {

constexpr int kThreads = 512;

// What the pipeline runs for: a prefill, one in shares, the transitions of its segments, or the backward pass's states.
enum class Pass { kPrefill, kShares, kTransition, kStates };

// A tile is [16 tokens][64 channels] of 16 bits, rows of 128 bytes in the 128-byte swizzle; q, k, g and v are two tiles
// each.
constexpr int kTileBytes = 2048;

// Of a stage. K and Q alternate so that a 32-row operand of 64 channels is contiguous.
constexpr int kKeyOffset = 0;       // k, then -Kd: tiles 0 and 2
constexpr int kQueryOffset = 2048;  // q, then Qd: tiles 1 and 3
constexpr int kValueOffset = 8192;  // v, or the gradient of o: a tile for each scan
// Behind v: g, then Kr in its first two tiles. With 32 bits g has four tiles, of 32 channels.

// Of the factors of a chunk that are not tiles.
constexpr int kSolveOffset = 0;           // bf16 [2][32][8]: rows of A - I, then of PA or P; scratch before that
constexpr int kDecayOffset = 1024;        // fp32 [128]: d, in the order a scan thread reads it
constexpr int kValueScaleOffset = 1536;   // fp32 [16]
constexpr int kOutputScaleOffset = 1600;  // fp32 [16]
constexpr int kColumnScaleOffset = 1664;  // fp32 [16]: c, lowered
constexpr int kChunkInfoOffset = 1728;
constexpr int kFactorBytes = 1792;

constexpr int kSharedBytes = 232448;

// kScans warpgroups scan, 64 rows each: both halves of a value head, or one of them where blocks outnumber heads.
// kOutputBytes: what a warp of the scan has for what it stores. kScanThreadRegisters: of a scan thread. kMapBytes: of
// the maps that states come through on their way into a segment, 1024-byte aligned, with a pair of barriers a half.
// kHasFirstRing: the stages serve another pass of the block first, with barriers of its own.
template <typename Gate, int kScanWarpgroups, int kOutputBytes, int kScanThreadRegisters = 144, int kMapBytes = 0,
          bool kHasFirstRing = false>
struct Layout {
  using G = Gate;
  static constexpr int kScans = kScanWarpgroups;
  static constexpr bool kQueries = true;
  static constexpr bool kWideGate = sizeof(G) == 4;
  static constexpr int kValueTiles = kScans;
  static constexpr int kGateOffset = kValueOffset + kScans * kTileBytes;
  __host__ __device__ static constexpr int value_offset(int tile) { return kValueOffset + tile * kTileBytes; }
  static constexpr int kStageBytes = kGateOffset + (kWideGate ? 4 : 2) * kTileBytes;
  // All other warps but the loader's, with a stage for each.
  static constexpr int kOtherWarps = kThreads / 32 - 4 * kScans - 1;
  static constexpr int kScanRegisters = kScanThreadRegisters;
  static constexpr int kTransformRegisters = (4 * 128 - kScans * kScanRegisters) / (4 - kScans) / 8 * 8;
  static constexpr int kBiasBytes = kOtherWarps * kHeadDim * 4;
  static constexpr int kAllOutputBytes = 4 * kScans * kOutputBytes;
  static constexpr int kMapBarrierBytes = kMapBytes > 0 ? 4 * 8 : 0;
  static constexpr int kHandoverBytes = kHasFirstRing ? 8 : 0;
  static constexpr int kAlignment = 1024;
  // As many stages as there is room for.
  static constexpr int kStageBarriers = kHasFirstRing ? 6 : 3;
  static constexpr int kStages =
      (kSharedBytes - kMapBytes - kMapBarrierBytes - kHandoverBytes - kBiasBytes - kAllOutputBytes - kAlignment) /
      (kStageBytes + kFactorBytes + kStageBarriers * 8);
  static constexpr int kTransformWarps = std::min(kOtherWarps, kStages);
  static constexpr int kMaps = kStages * kStageBytes;
  static constexpr int kFactors = kMaps + kMapBytes;
  static constexpr int kBias = kFactors + kStages * kFactorBytes;
  static constexpr int kOutput = kBias + kBiasBytes;
  static constexpr int kBarriers = kOutput + kAllOutputBytes;
  static constexpr int kFirstBarriers = kBarriers + 3 * 8 * kStages;
  static constexpr int kHandover = kBarriers + kStageBarriers * 8 * kStages;
  static constexpr int kMapBarriers = kHandover + kHandoverBytes;
  static constexpr int kBytes = kMapBarriers + kMapBarrierBytes + kAlignment;
  static_assert(kBytes <= kSharedBytes);
};

// A sequence of a packed call: the one of that rank by length, from what plan.cuh left.
struct PackedSequence {
  int index;
  int begin;
  int length;
};

// The cleaned cu_seqlens.
__device__ __forceinline__ const int* packed_offsets(const void* plan, int sequences) {
  return reinterpret_cast<const int*>(static_cast<const char*>(plan) + plan_layout(sequences).offsets);
}

__device__ __forceinline__ PackedSequence packed_sequence(const void* plan, int sequences, int rank) {
  const int* offsets = packed_offsets(plan, sequences);
  const int index = reinterpret_cast<const int*>(static_cast<const char*>(plan) + plan_layout(sequences).order)[rank];
  const int begin = offsets[index];
  return {index, begin, offsets[index + 1] - begin};
}

// What a chunk is. Written by the loader before it arrives on `full`.
struct ChunkInfo {
  int token;  // first token, in its row of the batch
  int batch;
  int value_head;
  int sequence;
  int left;     // tokens of the sequence from here on; 0 for an item without chunks, negative at the end of work
  int part;     // half of the rows, where blocks take halves
  int segment;  // of the sequence
  int flags;
  int chunks;  // of kStates and kTransition: chunks of the item; of padding: tokens; of kShares: first chunks without o
  union {
    int tile;    // of kStates: the item's first
    float kept;  // of kShares, behind the transform of a chunk that warms up: no less than |R| of S' = S R + B
  };
  int item;  // of kTransition: how many items came before in this block; of kShares: first chunks that decide
  // Of a prefill's first chunk: where the state of its value head comes from, and where it goes behind the run's last.
  const void* initial_state;  // null for zero
  void* final_state;          // null for nowhere
};
static_assert(kChunkInfoOffset + sizeof(ChunkInfo) <= kFactorBytes);
constexpr int kStop = -1;
constexpr int kFromStart = 1, kToEnd = 2;  // the run begins with its sequence; ends with it
constexpr int kReverse = 4;                // the run goes from its last chunk to its first
constexpr int kContinues = 8;              // the run begins with the state that the one before it ended with
constexpr int kPadding = 16;               // no chunks: o gets zeros, for `chunks` tokens from `token` on
constexpr int kTried = 32;                 // the run may be given up (chunk_kda_fwd/shares.cuh)
constexpr int kWarmsUp = 64;               // its first chunks, which decide that

// Of kShares: what becomes of a block's first run, shared by its warps.
struct Attempt {
  static constexpr int kBytes = 64;
  static constexpr int kPending = 0, kRight = 1, kWrong = 2;
  uint32_t address;

  // The scan's verdict; or kWrong ahead of it, of a transform warp that sees what the scan would see. No barrier lies
  // between those who set it and those who look: all do it by atomics, one lane a warp.
  __device__ int* word() const { return shared_pointer<int>(address); }
  // Sets it to kWrong, or leaves it; whether it is kWrong then. By all lanes of a warp.
  __device__ bool give_up(bool wrong) const {
    int before = kPending;
    if (threadIdx.x % 32 == 0) before = atomicMax(word(), wrong ? kWrong : kPending);
    return __shfl_sync(0xffffffffu, before, 0) == kWrong || wrong;
  }
  // fp32: a channel that keeps more than that over a chunk will not be forgotten.
  __device__ uint32_t most() const { return address + 4; }
  __device__ uint32_t sums() const { return address + 16; }  // fp32 [8]: each warp's part of the squares of R

  // Of the loader, before the first chunk.
  __device__ void init(float most_kept) const {
    *word() = kPending;
    *shared_pointer<float>(most()) = most_kept;
  }
};

// The exponentials exp(G) and exp(-G) are taken as 2^(x + kLift) and 2^-(x + kLift). A bounded gate spans 2^115 in a
// chunk, so the lift centres both in fp32's range for keys of any size; it cancels in L, P and the scales a token.
template <bool kBounded>
constexpr float kLift = kBounded ? 58.f : 0.f;
// Gates wait for their sums as fp16, in units where the largest decay just fits and the smallest keeps its 11 bits.
constexpr float kGateUnit = 4096.f;
constexpr uint32_t kInverseGateUnitFp16 = 0x0c00;  // 2^-12
// An unbounded gate decays a token by at most e^-10.
constexpr float kLowestLogDecay = -10.f;

// Barriers of a stage, with who arrives and who waits:
//   full   the loader's thread and TMA's bytes        -> the transform warp
//   ready  the transform warp, every lane             -> scan warps
//   empty  the scan warps, every lane                 -> the loader, and the transform warp that is next
// One lane could arrive for its warp behind a __syncwarp; every lane arriving costs no time, and race detectors follow
// it.
struct Barriers {
  uint32_t base;
  int stages;
  __device__ uint32_t full(int stage) const { return base + 8 * stage; }
  __device__ uint32_t ready(int stage) const { return base + 8 * (stages + stage); }
  __device__ uint32_t empty(int stage) const { return base + 8 * (2 * stages + stage); }
};

// Position in the ring.
template <int kStages>
struct Cursor {
  int stage;
  uint32_t parity = 0;
  __device__ explicit Cursor(int start) : stage(start) {}
  __device__ void advance(int by) {
    stage += by;
    if (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
};

// What a block's roles start from. Made by all threads.
template <typename L>
struct Block {
  uint8_t* base;
  uint32_t shared;
  Barriers barriers;

  // The `leader` goes on with `first` while the others wait for the barriers.
  template <typename First>
  __device__ __forceinline__ Block(uint8_t* unaligned, int scan_threads, int leader, const First& first)
      : base(unaligned +
             ((L::kAlignment - (cute::cast_smem_ptr_to_uint(unaligned) & (L::kAlignment - 1))) & (L::kAlignment - 1))),
        shared(cute::cast_smem_ptr_to_uint(base)),
        barriers{shared + L::kBarriers, L::kStages} {
    if (threadIdx.x == leader) {
      init(barriers, scan_threads);
      cutlass::arch::fence_barrier_init();
      first(*this);
    }
    __syncthreads();
  }

  __device__ __forceinline__ Block(uint8_t* unaligned, int scan_threads)
      : Block(unaligned, scan_threads, 0, [](const Block&) {}) {}

  // Of one thread.
  __device__ __forceinline__ static void init(const Barriers& ring, int scan_threads) {
    for (int stage = 0; stage < L::kStages; ++stage) {
      mbarrier_init(ring.full(stage), 1);
      mbarrier_init(ring.ready(stage), 32);
      mbarrier_init(ring.empty(stage), scan_threads);
    }
  }

  __device__ Barriers first_barriers() const { return {shared + L::kFirstBarriers, L::kStages}; }
  // The first pass's scan and transform warps, every lane, when they leave its stages -> the loader.
  __device__ uint32_t handover() const { return shared + L::kHandover; }
  __device__ uint32_t bias(int transform_warp) const { return shared + L::kBias + transform_warp * kHeadDim * 4; }
  __device__ ChunkInfo* infos() const { return reinterpret_cast<ChunkInfo*>(base + L::kFactors + kChunkInfoOffset); }
};

}  // namespace flashkda::chunk_kda
