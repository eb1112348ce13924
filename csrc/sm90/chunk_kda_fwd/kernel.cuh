// Chunked KDA forward for Hopper: one block a multiprocessor, one (sequence, value head) at a time, 16 tokens a chunk.
//
// A ring of shared-memory stages, one a chunk, passes through three roles:
//
//   loader      (1 thread)       takes work items and has TMA bring q, k, g, v of their chunks, as many ahead as there are stages
//   transform   (7 warps)        a warp owns a chunk: it turns q, k, g in place into Qd, Kd, Kr, and solves the 16x16 system
//   scan        (2 warpgroups)   64 rows of V each: carries the fp32 state through the chunks in registers, writes o
//
// With G the cumulative log decay inside the chunk, d = diag(exp(G_last)), n_k and n_q the norms that q and k are divided by (1
// without normalisation), and k, q raw, the scan computes
//
//   W  = V n_k - Kd S^T                  Kd = k exp(G)
//   U  = AU W                            AU = n_k^-1 (I + L)^-1 diag(beta) n_k^-1
//   O  = (Qd S^T + PA W) scale / n_q     PA = lower(Qd Ki^T) AU            Qd = q exp(G), Ki = k exp(-G)
//   S' = S d + U^T Kr                    Kr = k exp(G_last - G)
//
// so that normalisation costs nothing an element: it is in AU, PA and one factor a token on V and O. Everything is transposed
// (rows of V are rows of the products, tokens are columns), which keeps S in accumulators whose bf16 copy is already an A operand.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "common/hopper.cuh"
#include "common/math.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/launch.h"
#include "sm90/chunk_kda_fwd/tensor_map.h"

namespace flashkda::chunk_kda_fwd {

constexpr int kThreads = 512;

// A tile is [16 tokens][64 channels] of 16 bits, rows of 128 bytes in the 128-byte swizzle; q, k, g and v are two tiles each.
constexpr int kTileBytes = 2048;

// Of a stage. K and Q alternate so that a 32-row operand of 64 channels is contiguous.
constexpr int kKeyOffset = 0;         // k, then -Kd: tiles 0 and 2
constexpr int kQueryOffset = 2048;    // q, then Qd: tiles 1 and 3
constexpr int kRestOffset = 8192;     // g where it has 16 bits, then Kr: tiles 4 and 5
constexpr int kValueOffset = 12288;   // v: tiles 6 and 7, or tile 6 alone
constexpr int kWideGateOffset = 16384;  // g where it has 32 bits: four tiles of 32 channels

// Of the factors of a chunk that are not tiles.
constexpr int kSolveOffset = 0;        // bf16 [2][32][8]: rows of AU, then of PA; scratch before that
constexpr int kDecayOffset = 1024;     // fp32 [128]: d, in the order a scan thread reads it
constexpr int kValueScaleOffset = 1536;   // fp32 [16]
constexpr int kOutputScaleOffset = 1600;  // fp32 [16]
constexpr int kColumnScaleOffset = 1664;  // fp32 [16]
constexpr int kChunkInfoOffset = 1728;
constexpr int kFactorBytes = 1792;

// 16 tokens x 16 columns of o on their way out, one for each warp of the scan.
constexpr int kOutputBytes = 512;

// kScans warpgroups scan, 64 rows of V each: both halves of a value head, or one of them where blocks outnumber heads.
template <typename G, int kScans>
struct Layout {
  static constexpr bool kWideGate = sizeof(G) == 4;
  static constexpr int kStages = kWideGate ? 8 : 12;
  // All other warps but the loader's, as long as there is a stage for each.
  static constexpr int kTransformWarps = kScans == 2 || kWideGate ? 7 : 11;
  static constexpr int kScanRegisters = kScans == 2 ? 144 : 152;
  static constexpr int kTransformRegisters = kScans == 2 ? 112 : 120;
  static constexpr int kStageBytes = kWideGate ? 24576 : 16384;
  static constexpr int kLoadBytes = (kWideGate ? 16384 : 12288) + kScans * kTileBytes;
  static constexpr int kFactors = kStages * kStageBytes;
  static constexpr int kBias = kFactors + kStages * kFactorBytes;
  static constexpr int kOutput = kBias + kTransformWarps * kHeadDim * 4;
  static constexpr int kBarriers = kOutput + kScans * 4 * kOutputBytes;
  static constexpr int kBytes = kBarriers + 3 * 8 * kStages + 1024;  // 1024 to align the base
};

struct Arguments {
  CUtensorMap q, k, v, g;
  ChunkKdaFwdParams p;
};

// What a chunk is. Written by the loader before it arrives on `full`.
struct ChunkInfo {
  int token;  // first token, in its row of the batch
  int batch;
  int value_head;
  int sequence;
  int left;  // tokens of the sequence from here on; 0 only for an empty sequence, negative at the end of work
  int half;  // of the rows of V, where blocks take halves
  int pad[2];
};
constexpr int kStop = -1;

// The exponentials exp(G) and exp(-G) are taken as 2^(x + kLift) and 2^-(x + kLift). A bounded gate spans 2^115 in a chunk, so the
// lift centres both in fp32's range for keys of any size; it cancels in L, P and the scales a token.
template <bool kBounded>
constexpr float kLift = kBounded ? 58.f : 0.f;
// Gates wait for their sums as fp16, in units where the largest decay just fits and the smallest keeps its 11 bits.
constexpr float kGateUnit = 4096.f;
constexpr uint32_t kInverseGateUnitFp16 = 0x0c00;  // 2^-12
// An unbounded gate decays a token by at most e^-10.
constexpr float kLowestLogDecay = -10.f;

// Barriers of a stage, with who arrives and who waits:
//   full   the loader's thread and TMA's bytes        -> the transform warp
//   ready  the transform warp, once                   -> scan warps
//   empty  each scan warp, once                       -> the loader
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

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

__device__ __forceinline__ void unpack(float (&x)[8], const uint32_t (&bits)[4], __nv_bfloat16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(bits[i] << 16);
    x[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(float (&x)[8], const uint32_t (&bits)[4], __half) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __half2 pair;
    memcpy(&pair, &bits[i], 4);
    const float2 f = __half22float2(pair);
    x[2 * i] = f.x;
    x[2 * i + 1] = f.y;
  }
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) { return pack_bf16(low, high); }
__device__ __forceinline__ uint32_t pack(float low, float high, __half) { return pack_fp16(low, high); }

__device__ __forceinline__ float load_scalar(const void* base, int64_t index, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(base)[index];
  if (dtype == Dtype::kFloat16) return __half2float(static_cast<const __half*>(base)[index]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[index]);
}

// ---- loader

struct Item {
  int batch;
  int begin;
  int length;
  int value_head;
  int sequence;
};

__device__ __forceinline__ Item read_item(const ChunkKdaFwdParams& p, int index) {
  Item item;
  const int rank = index / p.value_heads;
  item.value_head = index - rank * p.value_heads;
  if (p.cu_seqlens) {
    const char* workspace = static_cast<const char*>(p.workspace);
    const WorkspaceLayout layout = workspace_layout(p.sequences);
    const int* offsets = reinterpret_cast<const int*>(workspace + layout.offsets);
    item.sequence = reinterpret_cast<const int*>(workspace + layout.order)[rank];
    item.batch = 0;
    item.begin = offsets[item.sequence];
    item.length = offsets[item.sequence + 1] - item.begin;
  } else {
    item.sequence = rank;
    item.batch = rank;
    item.begin = 0;
    item.length = int(p.tokens);
  }
  return item;
}

template <typename G, int kScans>
__device__ void load(const Arguments& arguments, uint32_t shared, ChunkInfo* info_base, Barriers barriers) {
  using L = Layout<G, kScans>;
  const ChunkKdaFwdParams& p = arguments.p;
  constexpr int kHalves = 3 - kScans;
  const int items = p.sequences * p.value_heads * kHalves;
  const int group = p.value_heads / p.heads;
  int* ticket = static_cast<int*>(p.workspace);
  Cursor<L::kStages> cursor(0);

  auto next_info = [&]() -> ChunkInfo* {
    mbarrier_wait(barriers.empty(cursor.stage), cursor.parity ^ 1);
    return reinterpret_cast<ChunkInfo*>(reinterpret_cast<char*>(info_base) + cursor.stage * kFactorBytes);
  };

  // Sequences of a dense batch are equally long, so dealing them round is as good as tickets.
  for (int index = blockIdx.x; index < items;) {
    const int next = p.cu_seqlens ? int(gridDim.x) + atomicAdd(ticket, 1) : index + int(gridDim.x);
    const Item item = read_item(p, index / kHalves);
    const int first_half = index % kHalves;
    const int head = item.value_head / group;
    if (p.initial_state) {
      const int64_t state = (int64_t(item.sequence) * p.value_heads + item.value_head) * (kHeadDim * kHeadDim);
      if (first_half == 0) bulk_prefetch_l2(p.initial_state + state, kHeadDim * kHeadDim * 4);
    }
    const int chunks = item.length > 0 ? (item.length + kChunk - 1) / kChunk : 1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ChunkInfo* info = next_info();
      const int done = chunk * kChunk;
      const int token = item.begin + done;
      info->token = token;
      info->batch = item.batch;
      info->value_head = item.value_head;
      info->sequence = item.sequence;
      info->left = item.length - done;
      info->half = first_half;
      const uint32_t full = barriers.full(cursor.stage);
      if (item.length > 0) {
        const uint32_t stage = shared + cursor.stage * L::kStageBytes;
        mbarrier_arrive_expect_tx(full, L::kLoadBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          tma_load_4d(stage + kKeyOffset + half * 4096, &arguments.k, full, half * 64, token, head, item.batch);
          tma_load_4d(stage + kQueryOffset + half * 4096, &arguments.q, full, half * 64, token, head, item.batch);
        }
        if constexpr (L::kWideGate) {
#pragma unroll
          for (int quarter = 0; quarter < 4; ++quarter) {
            tma_load_4d(stage + kWideGateOffset + quarter * kTileBytes, &arguments.g, full, quarter * 32, token,
                        item.value_head, item.batch);
          }
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            tma_load_4d(stage + kRestOffset + half * kTileBytes, &arguments.g, full, half * 64, token, item.value_head,
                        item.batch);
          }
        }
#pragma unroll
        for (int half = 0; half < kScans; ++half) {
          tma_load_4d(stage + kValueOffset + half * kTileBytes, &arguments.v, full, (first_half + half) * 64, token,
                      item.value_head, item.batch);
        }
      } else {
        mbarrier_arrive(full);
      }
      cursor.advance(1);
    }
    index = next;
  }
  // The scan leaves at the first of these; every transform warp meets one.
  for (int i = 0; i < L::kTransformWarps; ++i) {
    ChunkInfo* info = next_info();
    info->left = kStop;
    mbarrier_arrive(barriers.full(cursor.stage));
    cursor.advance(1);
  }
}

// ---- transform

// The log decay in units of log2(e) / kGateUnit, from g as loaded. `bias` as stage_bias left it.
struct GateFunction {
  Gate mode;
  float factor;
  float inverse;

  __device__ GateFunction(const ChunkKdaFwdParams& p) : mode(p.gate), factor(0.f), inverse(1.f / (p.lower_bound * kLog2e * kGateUnit)) {}

  template <bool kBounded>
  __device__ __forceinline__ void set_head(const ChunkKdaFwdParams& p, int value_head) {
    const float a = p.A_log ? flashkda::exp(p.A_log[value_head]) : 1.f;
    factor = kBounded ? -a * kLog2e : -a * (kLog2e * kGateUnit);
  }

  template <bool kBounded>
  __device__ __forceinline__ float operator()(float g, float bias) const {
    if constexpr (kBounded) {
      // lower_bound * sigmoid(x) = 1 / ((1 + exp(-x)) / lower_bound)
      return rcp(fmaf(ex2(fmaf(g, factor, bias)), inverse, inverse));
    } else {
      constexpr float kLowest = kLowestLogDecay * kLog2e * kGateUnit;
      if (mode == Gate::kPrecomputed) return fmaxf(g * (kLog2e * kGateUnit), kLowest);
      const float x = g + bias;
      const float e = ex2(-fabsf(x) * kLog2e);
      float log1p;
      asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log1p) : "f"(1.f + e));
      // 1 + e loses the low bits of a small e, which are all there is of a slow gate.
      log1p = e < 0.015625f ? fmaf(fmaf(e, 0.33333333f, -0.5f) * e, e, e) : log1p * 0.69314718f;
      return fmaxf((fmaxf(x, 0.f) + log1p) * factor, kLowest);
    }
  }
};

template <typename T, typename G, bool kBounded, int kScans>
__device__ void transform(const ChunkKdaFwdParams& p, uint32_t shared, uint32_t bias_address, Barriers barriers, int warp) {
  using L = Layout<G, kScans>;
  const int lane = threadIdx.x % 32;
  const int row = lane / 4;         // and row + 8: tokens of this thread's fragments
  const int pair = lane % 4 * 2;    // and pair + 1, + 8, + 9: its channels, or tokens where those are summed over
  constexpr float lift = kLift<kBounded>;
  const float up_scale = power_of_two(int(lift)), down_scale = power_of_two(-int(lift));

  // This lane's part of an address for ldmatrix and stmatrix on 16 tokens x 16 channels of a swizzled tile.
  const int matrix_row = lane % 16;
  const uint32_t matrix_address = matrix_row * 128 + (uint32_t((lane / 16) ^ (matrix_row % 8)) << 4);

  // sum_matrix[t][s] makes sums of gates: over s <= t, or where the gate is not bounded over 7 < s <= t less t < s <= 7, so that
  // neither exponential of a sum overflows.
  constexpr uint32_t one_low = kInverseGateUnitFp16, one_high = kInverseGateUnitFp16 << 16;
  constexpr uint32_t ones = one_low | one_high;
  const uint32_t upto = (pair <= row ? one_low : 0) | (pair + 1 <= row ? one_high : 0);
  const uint32_t after = (pair > row ? one_low | 0x8000 : 0) | (pair + 1 > row ? one_high | 0x80000000 : 0);
  const uint32_t whole_sum_matrix[3] = {kBounded ? upto : after, kBounded ? ones : 0u, upto};
  const float lifts[4] = {lift, lift, lift, lift};

  GateFunction gate(p);
  int bias_head = -1;

  Cursor<L::kStages> cursor(warp);
  for (;; cursor.advance(L::kTransformWarps)) {
    const uint32_t stage = shared + cursor.stage * L::kStageBytes;
    const uint32_t factors = shared + L::kFactors + cursor.stage * kFactorBytes;
    mbarrier_wait(barriers.full(cursor.stage), cursor.parity);
    const uint4 where = load_shared_uint4(factors + kChunkInfoOffset);
    const int left = load_shared_int(factors + kChunkInfoOffset + 16);
    if (left <= 0) {  // an empty sequence, or the end
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers.ready(cursor.stage));
      if (left == kStop) return;
      continue;
    }
    const int valid = min(left, kChunk);
    const int value_head = int(where.z);

    // Token lane % 16's beta; needed after the loop.
    const int beta_token = lane % 16;
    float beta = 0.f;
    if (beta_token < valid) {
      beta = load_scalar(p.beta,
                         int64_t(where.y) * p.beta_stride.batch + int64_t(where.x + beta_token) * p.beta_stride.token +
                             value_head * p.beta_stride.head,
                         p.beta_dtype);
    }

    if (value_head != bias_head) {
      bias_head = value_head;
      gate.template set_head<kBounded>(p, value_head);
      const float factor = kBounded ? gate.factor : 1.f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) {
        const int channel = lane + 32 * i;
        const float bias = p.dt_bias ? p.dt_bias[int64_t(value_head) * kHeadDim + channel] : 0.f;
        store_shared_float(bias_address + channel * 4, bias * factor);
      }
      __syncwarp();
    }

    // Rows past the end are another sequence's, or padding that may hold NaN: nothing of them may enter a product. A gate of zero
    // may still decay, so its tokens leave the sums as well.
    uint32_t sum_matrix[4] = {whole_sum_matrix[0], whole_sum_matrix[1], 0u, whole_sum_matrix[2]};
    uint32_t reference_matrix[4] = {ones, ones, 0u, 0u};
    if (valid < kChunk) {
#pragma unroll
      for (int tile = 0; tile < L::kStageBytes / kTileBytes; ++tile) {
        for (int i = lane; i < (kChunk - valid) * 8; i += 32) {
          store_shared_uint4(stage + tile * kTileBytes + valid * 128 + i * 16, make_uint4(0, 0, 0, 0));
        }
      }
      const uint32_t early = (pair < valid ? 0xffffu : 0u) | (pair + 1 < valid ? 0xffff0000u : 0u);
      const uint32_t late = (pair + 8 < valid ? 0xffffu : 0u) | (pair + 9 < valid ? 0xffff0000u : 0u);
      sum_matrix[0] &= early;
      sum_matrix[1] &= early;
      sum_matrix[3] &= late;
      reference_matrix[0] &= early;
      reference_matrix[1] &= early;
      __syncwarp();
    }

    float l_left[4] = {}, p_left[4] = {};  // columns 0 to 7 of Kd Ki^T and Qd Ki^T
    float right[4] = {};                   // columns 8 to 15 of their rows 8 to 15, which are all that is needed of those
    float k_squares[2] = {}, q_squares[2] = {};

#pragma unroll 1
    for (int pairs = 0; pairs < kHeadDim / 32; ++pairs) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int slice = pairs * 2 + odd;
      const uint32_t k_address = stage + pairs / 2 * 4096 + (matrix_address ^ uint32_t(pairs % 2 * 64 + odd * 32));
      const uint32_t q_address = k_address + kQueryOffset;
      const uint32_t rest_address = k_address - pairs / 2 * 2048 + kRestOffset;

      // Gates, with tokens where a product sums: g[0], g[1] tokens pair and pair + 1 of channel row, g[2], g[3] tokens + 8, and
      // again for channel row + 8.
      float g[8];
      if constexpr (L::kWideGate) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int token = pair + i % 2 + i / 2 % 2 * 8;
          const int chunk = slice % 2 * 4 + i / 4 * 2 + row / 4;
          g[i] = load_shared_float(stage + kWideGateOffset + slice / 2 * kTileBytes + token * 128 + ((chunk ^ (token % 8)) << 4) +
                                   row % 4 * 4);
        }
      } else {
        uint32_t bits[4];
        ldmatrix_x4_trans(bits, rest_address);
        unpack(g, bits, T{});
      }
      const float bias_low = load_shared_float(bias_address + (slice * 16 + row) * 4);
      const float bias_high = load_shared_float(bias_address + (slice * 16 + 8 + row) * 4);
      uint32_t gates[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float bias = i < 2 ? bias_low : bias_high;
        gates[i] = pack_fp16(gate.template operator()<kBounded>(g[2 * i], bias),
                             gate.template operator()<kBounded>(g[2 * i + 1], bias));
      }

      // Their sums, with channels where a product sums: sums[half] rows row, row, row + 8, row + 8; channels pair, pair + 1 of half.
      float sums[2][4];
      mma_fp16(sums[0], sum_matrix, gates[0], gates[1], lifts);
      mma_fp16(sums[1], sum_matrix, gates[2], gates[3], lifts);
      float up[8], down[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        up[i] = ex2(sums[i / 4][i % 4]);
        down[i] = ex2(-sums[i / 4][i % 4]);
      }
      // Row 15's exponentials, for channels pair and pair + 1 of each half: the decay of the whole chunk.
      float last[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) last[i] = __shfl_sync(0xffffffffu, up[i / 2 * 4 + 2 + i % 2], 28 + lane % 4);

      uint32_t k_bits[4], q_bits[4];
      ldmatrix_x4(k_bits, k_address);
      ldmatrix_x4(q_bits, q_address);
      float k[8], q[8];
      unpack(k, k_bits, T{});
      unpack(q, q_bits, T{});
      float k_inverse[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        k_squares[i / 2 % 2] = fmaf(k[i], k[i], k_squares[i / 2 % 2]);
        q_squares[i / 2 % 2] = fmaf(q[i], q[i], q_squares[i / 2 % 2]);
        k_inverse[i] = k[i] * down[i];
        k[i] *= -up[i];
        q[i] *= up[i];
      }
      uint32_t kd[4], qd[4], ki[4], kr[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        kd[i] = pack_bf16(k[2 * i], k[2 * i + 1]);
        qd[i] = pack_bf16(q[2 * i], q[2 * i + 1]);
        ki[i] = pack_bf16(k_inverse[2 * i], k_inverse[2 * i + 1]);
        kr[i] = pack_bf16(k_inverse[2 * i] * last[i / 2 * 2], k_inverse[2 * i + 1] * last[i / 2 * 2 + 1]);
      }
      mma_bf16(l_left, kd[0], kd[1], kd[2], kd[3], ki[0], ki[2]);
      mma_bf16(p_left, qd[0], qd[1], qd[2], qd[3], ki[0], ki[2]);
      mma_bf16(right, kd[1], qd[1], kd[3], qd[3], ki[1], ki[3]);

      if constexpr (kBounded) {
#pragma unroll
        for (int i = 0; i < 4; ++i) last[i] *= down_scale;
      } else {
        // The scan needs decays from the chunk's start: those from its middle, times the decay up to there.
        float reference[2][4];
        mma_fp16(reference[0], reference_matrix, gates[0], gates[1], lifts);
        mma_fp16(reference[1], reference_matrix, gates[2], gates[3], lifts);
        float first[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          first[i] = ex2(reference[i / 2][i % 2]);
          last[i] *= first[i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          kd[i] = pack_bf16(k[2 * i] * first[i / 2 * 2], k[2 * i + 1] * first[i / 2 * 2 + 1]);
          qd[i] = pack_bf16(q[2 * i] * first[i / 2 * 2], q[2 * i + 1] * first[i / 2 * 2 + 1]);
        }
      }
      stmatrix_x4(k_address, kd);
      stmatrix_x4(q_address, qd);
      stmatrix_x4(rest_address, kr);
      if (lane >= 28) {
        store_shared_float4(factors + kDecayOffset + (slice * 4 + lane % 4) * 16, make_float4(last[0], last[1], last[2], last[3]));
      }
    }
    }

    if (p.beta_sigmoid) beta = sigmoid(beta);
    beta = beta_token < valid ? beta * p.beta_factor : 0.f;

    // Norms of rows row and row + 8, the same in the four lanes that hold a row.
    float k_inverse_norm[2], q_inverse_norm[2], k_norm[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        k_squares[i] += __shfl_xor_sync(0xffffffffu, k_squares[i], offset);
        q_squares[i] += __shfl_xor_sync(0xffffffffu, q_squares[i], offset);
      }
      const float k_square = p.qk_l2norm ? k_squares[i] + 1e-6f : 1.f;
      const float q_square = p.qk_l2norm ? q_squares[i] + 1e-6f : 1.f;
      k_inverse_norm[i] = rsqrt(k_square);
      q_inverse_norm[i] = rsqrt(q_square);
      k_norm[i] = k_square * k_inverse_norm[i];
    }
    float column_norm[4];  // of tokens pair, pair + 1, pair + 8, pair + 9
#pragma unroll
    for (int i = 0; i < 4; ++i) column_norm[i] = __shfl_sync(0xffffffffu, k_inverse_norm[i / 2], 4 * (pair + i % 2));
    float row_beta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) row_beta[i] = __shfl_sync(0xffffffffu, beta, row + 8 * i);
    if (lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t token = (row + 8 * i) * 4;
        store_shared_float(factors + kValueScaleOffset + token, k_norm[i] * up_scale);
        store_shared_float(factors + kOutputScaleOffset + token, q_inverse_norm[i] * down_scale * p.scale);
        store_shared_float(factors + kColumnScaleOffset + token, row_beta[i] * k_inverse_norm[i] * down_scale);
      }
    }

    // Both systems X (I + L) = R at once: lane t < 16 has row t of diag(1/n_k), lane 16 + t row t of P diag(1/n_k), and as X they
    // hold rows of AU and PA but for the scale a column. Rows of P travel through the scratch first, then L stays there.
    const uint32_t scratch = factors + kSolveOffset;
    const bool low0 = pair < row, low1 = pair + 1 < row;
    {
      const bool diagonal0 = pair <= row, diagonal1 = pair + 1 <= row;
      float c[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = column_norm[i] * up_scale;
      store_shared_float2(scratch + row * 64 + pair * 4, diagonal0 ? p_left[0] * c[0] : 0.f, diagonal1 ? p_left[1] * c[1] : 0.f);
      store_shared_float2(scratch + row * 64 + 32 + pair * 4, 0.f, 0.f);
      store_shared_float2(scratch + (row + 8) * 64 + pair * 4, p_left[2] * c[0], p_left[3] * c[1]);
      store_shared_float2(scratch + (row + 8) * 64 + 32 + pair * 4, diagonal0 ? right[2] * c[2] : 0.f,
                          diagonal1 ? right[3] * c[3] : 0.f);
    }
    __syncwarp();
    float x[16];
    {
      const int t = lane % 16;
      const float from_low = __shfl_sync(0xffffffffu, k_inverse_norm[0], t % 8 * 4);
      const float from_high = __shfl_sync(0xffffffffu, k_inverse_norm[1], t % 8 * 4);
      const float inverse_norm = t < 8 ? from_low : from_high;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 v = load_shared_float4(scratch + t * 64 + i * 16);
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) x[4 * i + j] = lane >= 16 ? values[j] : (4 * i + j == t ? inverse_norm : 0.f);
      }
    }
    __syncwarp();
    {
      // Minus L, since Kd carries a minus.
      float r[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) r[i] = row_beta[i] * k_inverse_norm[i];
      store_shared_float2(scratch + row * 64 + pair * 4, low0 ? l_left[0] * r[0] * column_norm[0] : 0.f,
                          low1 ? l_left[1] * r[0] * column_norm[1] : 0.f);
      store_shared_float2(scratch + (row + 8) * 64 + pair * 4, l_left[2] * r[1] * column_norm[0],
                          l_left[3] * r[1] * column_norm[1]);
      store_shared_float2(scratch + (row + 8) * 64 + 32 + pair * 4, low0 ? right[0] * r[1] * column_norm[2] : 0.f,
                          low1 ? right[1] * r[1] * column_norm[3] : 0.f);
    }
    __syncwarp();
#pragma unroll
    for (int s = 15; s > 0; --s) {
#pragma unroll
      for (int i = 0; i < (s + 3) / 4; ++i) {
        const float4 v = load_shared_float4(scratch + s * 64 + i * 16);
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (4 * i + j < s) x[4 * i + j] = fmaf(x[s], values[j], x[4 * i + j]);
        }
      }
    }
    uint32_t packed[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 v = load_shared_float4(factors + kColumnScaleOffset + i * 16);
      packed[2 * i] = pack_bf16(x[4 * i] * v.x, x[4 * i + 1] * v.y);
      packed[2 * i + 1] = pack_bf16(x[4 * i + 2] * v.z, x[4 * i + 3] * v.w);
    }
    __syncwarp();
    store_shared_uint4(scratch + lane * 16, make_uint4(packed[0], packed[1], packed[2], packed[3]));
    store_shared_uint4(scratch + 512 + lane * 16, make_uint4(packed[4], packed[5], packed[6], packed[7]));

    fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barriers.ready(cursor.stage));
  }
}

// ---- scan

// A thread holds rows `row` and `row + 8` of its warp's 16, columns 8 j + pair and + 1: state[4 j + 2 i + e] is row + 8 i, pair + e.
__device__ __forceinline__ void load_state(float (&state)[64], const float* matrix, bool v_first, int row, int pair) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* s = &state[4 * j + 2 * i];
      const int r = row + 8 * i, c = 8 * j + pair;
      if (v_first) {
        const float2 x = __ldg(reinterpret_cast<const float2*>(matrix + r * kHeadDim + c));
        s[0] = x.x;
        s[1] = x.y;
      } else {
        s[0] = __ldg(matrix + c * kHeadDim + r);
        s[1] = __ldg(matrix + (c + 1) * kHeadDim + r);
      }
    }
  }
}

__device__ __forceinline__ void store_state(const float (&state)[64], float* matrix, bool v_first, int row, int pair) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* s = &state[4 * j + 2 * i];
      const int r = row + 8 * i, c = 8 * j + pair;
      if (v_first) {
        *reinterpret_cast<float2*>(matrix + r * kHeadDim + c) = make_float2(s[0], s[1]);
      } else {
        matrix[c * kHeadDim + r] = s[0];
        matrix[(c + 1) * kHeadDim + r] = s[1];
      }
    }
  }
}

template <typename T, typename G, int kScans>
__device__ void scan(const ChunkKdaFwdParams& p, uint32_t shared, Barriers barriers) {
  using L = Layout<G, kScans>;
  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int pair = lane % 4 * 2;

  // This warp's 16 tokens x 16 columns of the v tile, for transposing ldmatrix; the same of o, for stmatrix and for reading rows.
  const int matrix_token = lane % 8 + lane / 16 * 8;
  const uint32_t v_offset = kValueOffset + warpgroup * kTileBytes + matrix_token * 128 +
                            ((uint32_t(warp * 2 + lane / 8 % 2) ^ (matrix_token % 8)) << 4);
  const uint32_t output = shared + L::kOutput + threadIdx.x / 32 * kOutputBytes;
  const uint32_t o_matrix = output + matrix_token * 32 + ((uint32_t(lane / 8 % 2) ^ (matrix_token / 4 % 2)) << 4);
  const uint32_t o_row = output + lane / 2 * 32 + ((uint32_t(lane % 2) ^ (lane / 8 % 2)) << 4);
  const int64_t o_chunk = int64_t(kChunk) * p.value_heads * kHeadDim;

  float state[64];
  Cursor<L::kStages> cursor(0);
  mbarrier_wait(barriers.ready(0), 0);
  for (;;) {
    const uint32_t info = shared + L::kFactors + cursor.stage * kFactorBytes + kChunkInfoOffset;
    const uint4 where = load_shared_uint4(info);
    const int2 what = load_shared_int2(info + 16);
    const int length = what.x;
    if (length == kStop) break;
    const int column = (what.y + warpgroup) * 64 + warp * 16;  // of V, this warp's first
    const int64_t matrix = (int64_t(where.w) * p.value_heads + where.z) * (kHeadDim * kHeadDim);
    if (p.initial_state) {
      load_state(state, p.initial_state + matrix, p.state_v_first, column + lane / 4, pair);
    } else {
#pragma unroll
      for (int i = 0; i < 64; ++i) state[i] = 0.f;
    }

    T* o = static_cast<T*>(p.o) +
           ((int64_t(where.y) * p.tokens + where.x + lane / 2) * p.value_heads + where.z) * kHeadDim + column + lane % 2 * 8;
    uint32_t copy[32];  // the state in bf16, made as soon as there is one
#pragma unroll
    for (int i = 0; i < 32; ++i) copy[i] = pack_bf16(state[2 * i], state[2 * i + 1]);
    // An empty sequence still has a stage.
    for (int left = length > 0 ? length : 1; left > 0; left -= kChunk) {
      const uint32_t stage = shared + cursor.stage * L::kStageBytes;
      const uint32_t factors = shared + L::kFactors + cursor.stage * kFactorBytes;
      const uint32_t empty = barriers.empty(cursor.stage);
      cursor.advance(1);
      if (length > 0) {
        // W and Qd S^T: 16 columns each.
        float both[16];
        const MatrixDescriptor keys = k_major_128b(stage + kKeyOffset);
        // The decay stands before the fence: there ptxas overlaps it with the products, after them it would wait for them.
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          const float4 d = load_shared_float4(factors + kDecayOffset + m * 64 + pair * 8);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            state[8 * m + 2 * i] *= d.x;
            state[8 * m + 2 * i + 1] *= d.y;
            state[8 * m + 4 + 2 * i] *= d.z;
            state[8 * m + 4 + 2 * i + 1] *= d.w;
          }
        }
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          wgmma_m64n32k16(both, copy + 4 * m, {keys.low + (m / 4 * 4096 + m % 4 * 32) / 16, keys.high}, m > 0);
        }
        wgmma_commit();

        uint32_t v_bits[4];
        ldmatrix_x4_trans(v_bits, stage + v_offset);
        const float2 v_scale[2] = {load_shared_float2(factors + kValueScaleOffset + pair * 4),
                                   load_shared_float2(factors + kValueScaleOffset + 32 + pair * 4)};
        float v[8];
        unpack(v, v_bits, T{});
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[2 * i] *= v_scale[i / 2].x;
          v[2 * i + 1] *= v_scale[i / 2].y;
        }
        wgmma_wait_all();

        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = pack_bf16(v[2 * i] + both[2 * i], v[2 * i + 1] + both[2 * i + 1]);
#pragma unroll
        for (int i = 0; i < 8; ++i) both[i] = 0.f;
        // U and the rest of O.
        wgmma_fence();
        wgmma_m64n32k16(both, w, k_major_plain(factors + kSolveOffset, 32), 1);
        wgmma_commit();
        const float2 o_scale[2] = {load_shared_float2(factors + kOutputScaleOffset + pair * 4),
                                   load_shared_float2(factors + kOutputScaleOffset + 32 + pair * 4)};
        wgmma_wait_all();

        uint32_t u[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) u[i] = pack_bf16(both[2 * i], both[2 * i + 1]);
        wgmma_fence();
        wgmma_m64n128k16_n_major(state, u, n_major_128b(stage + kRestOffset, kTileBytes));
        wgmma_commit();

        uint32_t o_bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          o_bits[i] = pack(both[8 + 2 * i] * o_scale[i / 2].x, both[8 + 2 * i + 1] * o_scale[i / 2].y, T{});
        }
        stmatrix_x4_trans(o_matrix, o_bits);
        __syncwarp();
        const uint4 row = load_shared_uint4(o_row);
        if (lane / 2 < left) *reinterpret_cast<uint4*>(o) = row;
        o += o_chunk;
        wgmma_wait_all();
#pragma unroll
        for (int i = 0; i < 32; ++i) copy[i] = pack_bf16(state[2 * i], state[2 * i + 1]);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty);
      mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
    }
    if (p.final_state) store_state(state, p.final_state + matrix, p.state_v_first, column + lane / 4, pair);
  }

  // Rows outside every sequence.
  if (p.cu_seqlens) {
    const int* offsets = reinterpret_cast<const int*>(static_cast<const char*>(p.workspace) + workspace_layout(p.sequences).offsets);
    const int64_t pieces = int64_t(p.value_heads) * (kHeadDim / 8);  // of 16 bytes, a row
    uint4* o = static_cast<uint4*>(p.o);
    const int64_t start = int64_t(blockIdx.x) * (kScans * 128) + threadIdx.x;
    const int64_t step = int64_t(gridDim.x) * (kScans * 128);
    const int64_t before = offsets[0] * pieces;
    for (int64_t i = start; i < before; i += step) o[i] = make_uint4(0, 0, 0, 0);
    const int64_t end = p.tokens * pieces;
    for (int64_t i = offsets[p.sequences] * pieces + start; i < end; i += step) o[i] = make_uint4(0, 0, 0, 0);
  }
}

template <typename T, typename G, bool kBounded, int kScans>
__global__ void __launch_bounds__(kThreads, 1) chunk_kda_fwd_kernel(const __grid_constant__ Arguments arguments) {
  using L = Layout<G, kScans>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* base = unaligned + ((1024 - (shared_address(unaligned) & 1023)) & 1023);
  const uint32_t shared = shared_address(base);
  const Barriers barriers{shared + L::kBarriers, L::kStages};

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::kStages; ++stage) {
      mbarrier_init(barriers.full(stage), 1);
      mbarrier_init(barriers.ready(stage), 1);
      mbarrier_init(barriers.empty(stage), kScans * 4);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  const int warp = threadIdx.x / 32;
  if (warp < kScans * 4) {
    setmaxnreg_increase<L::kScanRegisters>();
    scan<T, G, kScans>(arguments.p, shared, barriers);
  } else {
    setmaxnreg_decrease<L::kTransformRegisters>();
    const int role = warp - kScans * 4;
    if (role < L::kTransformWarps) {
      transform<T, G, kBounded, kScans>(arguments.p, shared, shared + L::kBias + role * kHeadDim * 4, barriers, role);
    } else if (role == L::kTransformWarps && threadIdx.x % 32 == 0) {
      load<G, kScans>(arguments, shared, reinterpret_cast<ChunkInfo*>(base + L::kFactors + kChunkInfoOffset), barriers);
    }
  }
}

// ---- host

template <typename T, typename G, bool kBounded, int kScans>
cudaError_t launch(const ChunkKdaFwdParams& p, cudaStream_t stream) {
  using L = Layout<G, kScans>;
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  const CUtensorMapDataType type = kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  Arguments arguments;
  arguments.p = p;
  const bool encoded =
      encode_tiles(&arguments.q, p.q, type, 2, p.batch, p.tokens, p.heads, p.q_stride) &&
      encode_tiles(&arguments.k, p.k, type, 2, p.batch, p.tokens, p.heads, p.k_stride) &&
      encode_tiles(&arguments.v, p.v, type, 2, p.batch, p.tokens, p.value_heads, p.v_stride) &&
      encode_tiles(&arguments.g, p.g, L::kWideGate ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : type, sizeof(G), p.batch, p.tokens,
                   p.value_heads, p.g_stride);
  if (!encoded) return cudaErrorInvalidValue;

  const auto kernel = chunk_kda_fwd_kernel<T, G, kBounded, kScans>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (error != cudaSuccess) return error;
  const Plan launch_plan = plan(p.sequences, p.value_heads, p.cu_seqlens != nullptr, p.sm_count);
  kernel<<<launch_plan.grid, kThreads, L::kBytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace flashkda::chunk_kda_fwd
