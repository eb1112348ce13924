// Carries the states through the chunks, and writes o:
//
//   W  = c (V n_k - Kd S^T)
//   U  = A W
//   O  = (Qd S^T + PA W) scale / n_q
//   S' = S d + U^T Kr
//
// with the factors as chunk_kda/pipeline.cuh has them. Everything is transposed.
#pragma once

#include "common/hopper.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda/state.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/entry.cuh"
#include "sm90/chunk_kda_fwd/items.cuh"
#include "sm90/chunk_kda_fwd/shares.cuh"

namespace flashkda::chunk_kda_fwd {

using namespace chunk_kda;

// 16 tokens x 16 columns of o on their way out, one for each warp of the scan.
constexpr int kOutputBytes = 512;

// Where this thread's first element of a state is; null where the state is. Worked out ahead of the test: with a branch
// around it ptxas spills in the transform.
__device__ __forceinline__ uint64_t thread_place(const ChunkKdaFwdParams& p, uint64_t state, bool is_bf16, int row,
                                                 int pair) {
  const int first = first_element(p.state_v_first, row, pair);
  return state ? state + first * (is_bf16 ? 2 : 4) : 0;
}

// Zeros in a warpgroup's 64 columns of o, for the tokens of a sequence that is padding.
template <typename T>
__device__ __forceinline__ void clear_o(const ChunkKdaFwdParams& p, uint4 where, int tokens, int column) {
  const int thread = threadIdx.x % 128;
  const int64_t row = int64_t(p.value_heads) * kHeadDim;
  T* o = static_cast<T*>(p.o) + (int64_t(where.y) * p.tokens + where.x + thread / 8) * row + where.z * kHeadDim +
         column + thread % 8 * 8;
#pragma unroll 1
  for (int token = thread / 8; token < tokens; token += 16, o += 16 * row)
    *reinterpret_cast<uint4*>(o) = make_uint4(0, 0, 0, 0);
}

template <typename T, typename L, Cut kCut>
__device__ __forceinline__ void scan(const Arguments& arguments, uint32_t shared, Barriers barriers) {
  using cute::SM90::GMMA::Major;
  using cute::SM90::GMMA::ScaleOut;
  constexpr bool kSegments = in_segments(kCut), kShares = kCut == Cut::kShares;
  const ChunkKdaFwdParams& p = arguments.p;
  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int pair = lane % 4 * 2;

  // This warp's 16 tokens x 16 columns of the v tile, for transposing ldmatrix; the same of o, for stmatrix and for
  // reading rows.
  const int matrix_token = lane % 8 + lane / 16 * 8;
  uint32_t v_matrix = shared + kValueOffset + warpgroup * kTileBytes + matrix_token * 128 +
                      ((uint32_t(warp * 2 + lane / 8 % 2) ^ (matrix_token % 8)) << 4);
  uint32_t o_matrix = shared + L::kOutput + threadIdx.x / 32 * kOutputBytes + matrix_token * 32 +
                      ((uint32_t(lane / 8 % 2) ^ (matrix_token / 4 % 2)) << 4);
  uint32_t o_row = shared + L::kOutput + threadIdx.x / 32 * kOutputBytes + lane / 2 * 32 +
                   ((uint32_t(lane % 2) ^ (lane / 8 % 2)) << 4);
  uint32_t pair_factors = shared + L::kFactors + pair * 4;
  uint32_t pair_decays = shared + L::kFactors + kDecayOffset + lane % 4 * 16;
  uint32_t o_token = lane / 2;
  keep(v_matrix);
  keep(o_matrix);
  keep(o_row);
  keep(pair_factors);
  keep(pair_decays);
  keep(o_token);
  const int64_t o_chunk = int64_t(kChunk) * p.value_heads * kHeadDim;

  [[maybe_unused]] MapRing ring(shared + L::kMaps, shared + L::kMapBarriers);
  float state[2][32];  // of K, halves
  uint32_t copy[32];
  // The transitions, or that the words are cleared: shares begin when they are.
  if (kCut == Cut::kMapsAhead || (kCut == Cut::kMapsFirst && !arguments.shares.words)) cudaGridDependencySynchronize();
  Cursor<L::kStages> cursor(0);
  if constexpr (kShares) try_piece<L>(arguments, shared, barriers, cursor);
  mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
  for (;;) {
    const uint32_t info = shared + L::kFactors + cursor.stage * kFactorBytes + kChunkInfoOffset;
    const uint4 where = load_shared<uint4>(info);
    const uint4 what = load_shared<uint4>(info + offsetof(ChunkInfo, left));
    const int length = int(what.x);
    if (length == kStop) break;
    const int column = (int(what.y) + warpgroup) * 64 + warp * 16;  // of V, this warp's first
    const ulonglong2 states = load_shared<ulonglong2>(info + offsetof(ChunkInfo, initial_state));
    if (kSegments && !(what.w & kFromStart)) {
      const int64_t head = int64_t(where.w) * p.value_heads + where.z;
      enter_segment<L>(state, copy, arguments, ring, head, int(what.z), column, pair);
    } else if (!(what.w & kContinues)) {
      const uint64_t initial = thread_place(p, states.x, reads_bf16(p), column + lane / 4, pair);
      if (!initial) {
#pragma unroll
        for (int i = 0; i < 64; ++i) state[i / 32][i % 32] = 0.f;
      } else if (reads_bf16(p)) {
        load_state(state, reinterpret_cast<const __nv_bfloat16*>(initial), p.state_v_first);
      } else {
        load_state(state, reinterpret_cast<const float*>(initial), p.state_v_first);
      }
    }
    if (what.w & kPadding)
      clear_o<T>(p, where, load_shared<int>(info + offsetof(ChunkInfo, chunks)), column - warp * 16);

    if (length > 0) {
      copy_and_decay(state, copy, pair_decays + cursor.stage * kFactorBytes);
    }

    // This thread's 16 bytes of o leave a chunk late, where there is time to read them back from shared memory.
    T* o = static_cast<T*>(p.o) + column + lane % 2 * 8 +
           ((int64_t(where.y) * p.tokens + where.x + lane / 2 - kChunk) * p.value_heads + where.z) * kHeadDim;
    bool o_waits = false;
    [[maybe_unused]] int silent = kShares ? load_shared<int>(info + offsetof(ChunkInfo, chunks)) : 0;
    const auto store_o = [&] {
      const uint4 row = load_shared<uint4>(o_row);
      if (o_waits) *reinterpret_cast<uint4*>(o) = row;
      o += o_chunk;
    };

    // An empty sequence still has a stage.
    for (int left = length > 0 ? length : 1; left > 0; left -= kChunk) {
      const uint32_t stage = shared + cursor.stage * L::kStageBytes;
      const uint32_t factor_bytes = cursor.stage * kFactorBytes;
      const uint32_t solve = shared + L::kFactors + factor_bytes + kSolveOffset;
      const uint32_t factors = pair_factors + factor_bytes;
      const uint32_t v_address = v_matrix + cursor.stage * L::kStageBytes;
      const uint32_t empty = barriers.empty(cursor.stage);
      cursor.advance(1);
      if (length > 0) {
        // - Kd S^T and Qd S^T: 16 columns each.
        float both[16];
        const cute::GmmaDescriptor keys = swizzled_128b(stage + kKeyOffset);
        cute::warpgroup_arrive();
        multiply_copy(both, copy, keys, 4096, ScaleOut::Zero);
        cute::warpgroup_commit_batch();

        store_o();
        o_waits = int(o_token) < left && (!kShares || --silent < 0);
        uint32_t v_bits[4];
        ldmatrix_x4_trans(v_bits, v_address);
        const float2 v_scale[2] = {load_shared<float2>(factors + kValueScaleOffset),
                                   load_shared<float2>(factors + kValueScaleOffset + 32)};
        const float2 c[2] = {load_shared<float2>(factors + kColumnScaleOffset),
                             load_shared<float2>(factors + kColumnScaleOffset + 32)};
        float v[8];
        unpack(v, v_bits, T{});
        cute::warpgroup_wait<0>();

        // U and the rest of O begin with W and with Qd S^T.
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          both[2 * i] = fmaf(v[2 * i], v_scale[i / 2].x, both[2 * i]) * c[i / 2].x;
          both[2 * i + 1] = fmaf(v[2 * i + 1], v_scale[i / 2].y, both[2 * i + 1]) * c[i / 2].y;
          w[i] = pack_bf16(both[2 * i], both[2 * i + 1]);
        }
        cute::warpgroup_arrive();
        wgmma<Major::K>(both, w, k_major_plain(solve, 32));
        cute::warpgroup_commit_batch();
        const float2 o_scale[2] = {load_shared<float2>(factors + kOutputScaleOffset),
                                   load_shared<float2>(factors + kOutputScaleOffset + 32)};
        cute::warpgroup_wait<0>();

        uint32_t u[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) u[i] = pack_bf16(both[2 * i], both[2 * i + 1]);
        cute::warpgroup_arrive();
        wgmma<Major::MN>(state[0], u, swizzled_128b(stage + L::kGateOffset));
        cute::warpgroup_commit_batch();
        wgmma<Major::MN>(state[1], u, swizzled_128b(stage + L::kGateOffset + kTileBytes));
        cute::warpgroup_commit_batch();

        uint32_t o_bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          o_bits[i] = pack(both[8 + 2 * i] * o_scale[i / 2].x, both[8 + 2 * i + 1] * o_scale[i / 2].y, T{});
        }
        stmatrix_x4_trans(o_matrix, o_bits);
        __syncwarp();
        if (left > kChunk) {
          mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
          float4 d0[4], d1[4];
          load_decays(d0, pair_decays + cursor.stage * kFactorBytes, 0);
          cute::warpgroup_wait<1>();
          copy_and_decay(state, copy, 0, d0);
          load_decays(d1, pair_decays + cursor.stage * kFactorBytes, 1);
          cute::warpgroup_wait<0>();
          copy_and_decay(state, copy, 1, d1);
        } else {
          cute::warpgroup_wait<0>();
        }
      }
      __syncwarp();
      mbarrier_arrive(empty);
    }
    store_o();
    const uint64_t final = thread_place(p, states.y, writes_bf16(p), column + lane / 4, pair);
    if (final) {
      if (writes_bf16(p)) {
        store_state(state, reinterpret_cast<__nv_bfloat16*>(final), p.state_v_first);
      } else {
        store_state(state, reinterpret_cast<float*>(final), p.state_v_first);
      }
    }
    if constexpr (kShares) {
      cutlass::arch::NamedBarrier::sync(4 * L::kScans * 32, 0);
      if (threadIdx.x == 0) add_release(head_word(p, arguments.shares, int(where.w), int(where.z)), 1);
    }
    mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
  }

  // Rows outside every sequence.
  if (p.cu_seqlens) {
    cudaGridDependencySynchronize();
    const int* offsets = packed_offsets(p.workspace, p.sequences);
    const int64_t pieces = int64_t(p.value_heads) * (kHeadDim / 8);  // of 16 bytes, a row
    uint4* o = static_cast<uint4*>(p.o);
    const int64_t start = int64_t(blockIdx.x) * (L::kScans * 128) + threadIdx.x;
    const int64_t step = int64_t(gridDim.x) * (L::kScans * 128);
    const int64_t before = offsets[0] * pieces;
    for (int64_t i = start; i < before; i += step) o[i] = make_uint4(0, 0, 0, 0);
    const int64_t end = p.tokens * pieces;
    for (int64_t i = offsets[p.sequences] * pieces + start; i < end; i += step) o[i] = make_uint4(0, 0, 0, 0);
  }
}
}  // namespace flashkda::chunk_kda_fwd
