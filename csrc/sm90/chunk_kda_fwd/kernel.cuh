// Chunked KDA forward for Hopper: one block a multiprocessor, one (sequence, value head) or a part of one at a time, 16
// tokens a chunk.
//
// A ring of shared-memory stages, one a chunk, passes through three roles:
//
//   loader     (1 thread)           takes work items and has TMA bring q, k, g, v of their chunks, as many ahead as
//                                   there are stages
//   transform  (7 or 11 warps)      a warp owns a chunk: it turns q, k, g in place into Qd, Kd, Kr, and solves the
//                                   16x16 system
//   scan       (1 or 2 warpgroups)  64 rows of V each: carries the fp32 state through the chunks in registers, writes o
//
// With G the cumulative log decay inside the chunk, d = diag(exp(G_last)), n_k and n_q the norms that q and k are
// divided by (1 without normalisation), and k, q raw, the scan computes
//
//   W  = V n_k - Kd S^T                  Kd = k exp(G)
//   U  = AU W                            AU = n_k^-1 (I + L)^-1 diag(beta) n_k^-1
//   O  = (Qd S^T + PA W) scale / n_q     PA = lower(Qd Ki^T) AU            Qd = q exp(G), Ki = k exp(-G)
//   S' = S d + U^T Kr                    Kr = k exp(G_last - G)
//
// so that normalisation costs nothing an element: it is in AU, PA and one factor a token on V and O. Everything is
// transposed (rows of V are rows of the products, tokens are columns), which keeps S in accumulators whose bf16 copy is
// already an A operand.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>

#include <atomic>
#include <cstring>
#include <type_traits>

#include "common/hopper.cuh"
#include "common/math.cuh"
#include "sm90/chunk_kda_fwd/config.h"
#include "sm90/chunk_kda_fwd/launch.h"
#include "sm90/chunk_kda_fwd/tensor_map.h"

namespace flashkda::chunk_kda_fwd {

constexpr int kThreads = 512;

// A tile is [16 tokens][64 channels] of 16 bits, rows of 128 bytes in the 128-byte swizzle; q, k, g and v are two tiles
// each.
constexpr int kTileBytes = 2048;

// Of a stage. K and Q alternate so that a 32-row operand of 64 channels is contiguous.
constexpr int kKeyOffset = 0;       // k, then -Kd: tiles 0 and 2
constexpr int kQueryOffset = 2048;  // q, then Qd: tiles 1 and 3
constexpr int kValueOffset = 8192;  // v: a tile for each scan
// Behind v: g, then Kr in its first two tiles. With 32 bits g has four tiles, of 32 channels.

// Of the factors of a chunk that are not tiles.
constexpr int kSolveOffset = 0;           // bf16 [2][32][8]: rows of AU, then of PA; scratch before that
constexpr int kDecayOffset = 1024;        // fp32 [128]: d, in the order a scan thread reads it
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
  static constexpr int kGateOffset = kValueOffset + kScans * kTileBytes;
  static constexpr int kStageBytes = kGateOffset + (kWideGate ? 4 : 2) * kTileBytes;
  static constexpr int kStages = (kWideGate ? 11 : 13) - (kScans - 1);
  // All other warps but the loader's, with a stage for each.
  static constexpr int kTransformWarps = kScans == 2 ? 7 : 11;
  static constexpr int kScanRegisters = 144;
  static constexpr int kTransformRegisters = kScans == 2 ? 112 : 120;
  static constexpr int kFactors = kStages * kStageBytes;
  static constexpr int kBias = kFactors + kStages * kFactorBytes;
  static constexpr int kOutput = kBias + kTransformWarps * kHeadDim * 4;
  static constexpr int kBarriers = kOutput + kScans * 4 * kOutputBytes;
  static constexpr int kBytes = kBarriers + 3 * 8 * kStages + 1024;  // 1024 to align the base
  static_assert(kTransformWarps <= kStages && kBytes <= 232448);
};

struct Arguments {
  CUtensorMap q, k, v, g;
  ChunkKdaFwdParams p;
  int segments;
  int segment_chunks;
  // [sequences, value_heads, segments], where there are several: chunks before the segment from which a state of zero
  // is as good as the true one, or 0 where there are none within reach and the segment belongs to the run before it.
  // From the probe.
  int* warm_ups;
};

// What a chunk is. Written by the loader before it arrives on `full`.
struct ChunkInfo {
  int token;  // first token, in its row of the batch
  int batch;
  int value_head;
  int sequence;
  int left;  // tokens of the sequence from here on; 0 only for an empty sequence, negative at the end of work
  int part;  // half of the rows of V, where blocks take halves; the segment, in a probe
  int warm;  // tokens of the run that belong to the one before, which writes their o
  int flags;
};
constexpr int kStop = -1;
constexpr int kFromStart = 1, kToEnd = 2;  // the run begins with its sequence; ends with it

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
//   empty  the scan warps, every lane                 -> the loader
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

// An element of 4 bytes, or of 2. One predicated load each rather than a branch, at whose end a warp would wait for it.
__device__ __forceinline__ uint32_t load_bits(const void* base, int64_t index, bool wide) {
  uint32_t bits;
  asm volatile(
      "{\n"
      ".reg .pred wide;\n"
      "setp.ne.b32 wide, %2, 0;\n"
      "@wide ld.global.nc.b32 %0, [%1];\n"
      "@!wide ld.global.nc.u16 %0, [%1];\n"
      "}\n"
      : "=r"(bits)
      : "l"(static_cast<const char*>(base) + (index << (wide ? 2 : 1))), "r"(int(wide)));
  return bits;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return __uint_as_float(bits);
  if (dtype == Dtype::kBFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(uint16_t(bits)));
}

// ---- loader

// A run of chunks: a whole sequence, or a segment of one and those after it that need its state.
struct Item {
  int batch;
  int begin;
  int length;  // negative for nothing to do
  int value_head;
  int sequence;
  int part;
  int warm;
  int flags;
};

template <int kScans, bool kProbe>
__device__ __forceinline__ Item read_item(const Arguments& arguments, int index) {
  const ChunkKdaFwdParams& p = arguments.p;
  constexpr int kHalves = 3 - kScans;
  const int segments = arguments.segments, segment_tokens = arguments.segment_chunks * kChunk;
  Item item;
  int segment;
  if constexpr (kProbe) {
    segment = index % (segments - 1) + 1;
    index /= segments - 1;
    item.part = segment;
  } else {
    item.part = index % kHalves;
    index /= kHalves;
    segment = index % segments;
    index /= segments;
  }
  const int rank = index / p.value_heads;
  item.value_head = index - rank * p.value_heads;
  item.warm = 0;
  item.flags = kFromStart | kToEnd;
  if (p.cu_seqlens) {
    const char* workspace = static_cast<const char*>(p.workspace);
    const WorkspaceLayout layout = workspace_layout(p.sequences);
    const int* offsets = reinterpret_cast<const int*>(workspace + layout.offsets);
    item.sequence = reinterpret_cast<const int*>(workspace + layout.order)[rank];
    item.batch = 0;
    item.begin = offsets[item.sequence];
    item.length = offsets[item.sequence + 1] - item.begin;
    return item;
  }
  item.sequence = item.batch = rank;
  item.begin = segment * segment_tokens;
  if constexpr (kProbe) {
    item.length = min(kProbedChunks * kChunk, item.begin);
    item.begin -= item.length;
    return item;
  }
  int end = int(p.tokens);
  if (segments > 1) {
    const int* warm_ups = arguments.warm_ups + index * segments;
    item.flags = segment == 0 ? kFromStart : 0;
    if (segment > 0) {
      item.warm = warm_ups[segment] * kChunk;
      if (item.warm == 0) {
        item.length = -1;
        return item;
      }
    }
    int next = segment + 1;
    while (next < segments && warm_ups[next] == 0) ++next;
    if (next < segments) {
      end = next * segment_tokens;
    } else {
      item.flags |= kToEnd;
    }
  }
  item.begin -= item.warm;
  item.length = end - item.begin;
  return item;
}

template <typename G, int kScans, bool kProbe>
__device__ void load(const Arguments& arguments, uint32_t shared, ChunkInfo* info_base, Barriers barriers) {
  using L = Layout<G, kScans>;
  const ChunkKdaFwdParams& p = arguments.p;
  const int items = p.sequences * p.value_heads * (kProbe ? arguments.segments - 1 : (3 - kScans) * arguments.segments);
  const int group = p.value_heads / p.heads;
  int* ticket = static_cast<int*>(p.workspace);
  Cursor<L::kStages> cursor(0);

  auto next_info = [&]() -> ChunkInfo* {
    mbarrier_wait(barriers.empty(cursor.stage), cursor.parity ^ 1);
    return reinterpret_cast<ChunkInfo*>(reinterpret_cast<char*>(info_base) + cursor.stage * kFactorBytes);
  };

  cudaGridDependencySynchronize();  // the plan, or the probe
  // Sequences of a dense batch are equally long, so dealing them round is as good as tickets.
  for (int index = blockIdx.x, next; index < items; index = next) {
    next = p.cu_seqlens ? int(gridDim.x) + atomicAdd(ticket, 1) : index + int(gridDim.x);
    const Item item = read_item<kScans, kProbe>(arguments, index);
    if (item.length < 0) continue;
    const int first_half = kProbe ? 0 : item.part;
    const int head = item.value_head / group;
    if (!kProbe && p.initial_state && (item.flags & kFromStart) && first_half == 0) {
      const int64_t state = (int64_t(item.sequence) * p.value_heads + item.value_head) * (kHeadDim * kHeadDim);
      cute::SM90_BULK_COPY_G2S::PREFETCH::copy(p.initial_state + state, kHeadDim * kHeadDim * 4);
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
      info->part = item.part;
      info->warm = item.warm;
      info->flags = item.flags;
      const uint32_t full = barriers.full(cursor.stage);
      if (item.length > 0) {
        const uint32_t stage = shared + cursor.stage * L::kStageBytes;
        mbarrier_arrive_expect_tx(full, L::kStageBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          tma_load_4d(stage + kKeyOffset + half * 4096, &arguments.k, full, half * 64, token, head, item.batch);
          tma_load_4d(stage + kQueryOffset + half * 4096, &arguments.q, full, half * 64, token, head, item.batch);
        }
        if constexpr (L::kWideGate) {
#pragma unroll
          for (int quarter = 0; quarter < 4; ++quarter) {
            tma_load_4d(stage + L::kGateOffset + quarter * kTileBytes, &arguments.g, full, quarter * 32, token,
                        item.value_head, item.batch);
          }
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            tma_load_4d(stage + L::kGateOffset + half * kTileBytes, &arguments.g, full, half * 64, token,
                        item.value_head, item.batch);
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

  __device__ GateFunction(const ChunkKdaFwdParams& p)
      : mode(p.gate), factor(0.f), inverse(1.f / (p.lower_bound * kLog2e * kGateUnit)) {}

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
      float log1p = lg2(1.f + e);
      // 1 + e loses the low bits of a small e, which are all there is of a slow gate.
      log1p = e < 0.015625f ? fmaf(fmaf(e, 0.33333333f, -0.5f) * e, e, e) : log1p * 0.69314718f;
      return fmaxf((fmaxf(x, 0.f) + log1p) * factor, kLowest);
    }
  }
};

template <typename T, typename G, bool kBounded, int kScans, bool kProbe>
__device__ void transform(const ChunkKdaFwdParams& p, uint32_t shared, uint32_t bias_address, Barriers barriers,
                          int warp) {
  using L = Layout<G, kScans>;
  const int lane = threadIdx.x % 32;
  const int row = lane / 4;       // and row + 8: tokens of this thread's fragments
  const int pair = lane % 4 * 2;  // and pair + 1, + 8, + 9: its channels, or tokens where those are summed over
  constexpr float lift = kLift<kBounded>;
  const float up_scale = power_of_two(int(lift)), down_scale = power_of_two(-int(lift));

  // This lane's part of an address for ldmatrix and stmatrix on 16 tokens x 16 channels of a swizzled tile.
  const int matrix_row = lane % 16;
  const uint32_t matrix_address = matrix_row * 128 + (uint32_t((lane / 16) ^ (matrix_row % 8)) << 4);

  // sum_matrix[t][s] makes sums of gates: over s <= t, or where the gate is not bounded over 7 < s <= t less t < s <=
  // 7, so that neither exponential of a sum overflows.
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
    const uint4 where = load_shared<uint4>(factors + kChunkInfoOffset);
    const int left = load_shared<int>(factors + kChunkInfoOffset + 16);
    if (left <= 0) {  // an empty sequence, or the end
      __syncwarp();
      mbarrier_arrive(barriers.ready(cursor.stage));
      if (left == kStop) return;
      continue;
    }
    const int valid = min(left, kChunk);
    const int value_head = int(where.z);

    // Token lane % 16's beta, on its way while the loop runs.
    const int beta_token = lane % 16;
    const int64_t beta_index = int64_t(where.y) * p.beta_stride.batch +
                               int64_t(where.x + min(beta_token, valid - 1)) * p.beta_stride.token +
                               value_head * p.beta_stride.head;
    const uint32_t beta_bits = load_bits(p.beta, beta_index, p.beta_dtype == Dtype::kFloat32);

    if (value_head != bias_head) {
      bias_head = value_head;
      gate.template set_head<kBounded>(p, value_head);
      const float factor = kBounded ? gate.factor : 1.f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) {
        const int channel = lane + 32 * i;
        const float bias = p.dt_bias ? p.dt_bias[int64_t(value_head) * kHeadDim + channel] : 0.f;
        store_shared(bias_address + channel * 4, bias * factor);
      }
      __syncwarp();
    }

    // Rows past the end are another sequence's, or padding that may hold NaN: nothing of them may enter a product. A
    // gate of zero may still decay, so its tokens leave the sums as well.
    uint32_t sum_matrix[4] = {whole_sum_matrix[0], whole_sum_matrix[1], 0u, whole_sum_matrix[2]};
    uint32_t reference_matrix[4] = {ones, ones, 0u, 0u};
    if (valid < kChunk) {
#pragma unroll
      for (int tile = 0; tile < L::kStageBytes / kTileBytes; ++tile) {
        for (int i = lane; i < (kChunk - valid) * 8; i += 32) {
          store_shared(stage + tile * kTileBytes + valid * 128 + i * 16, make_uint4(0, 0, 0, 0));
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
    float right[4] = {};  // columns 8 to 15 of their rows 8 to 15, which are all that is needed of those
    float k_squares[2] = {}, q_squares[2] = {};
    float largest_decay = 0.f, kd_squares[2] = {}, kr_squares[2] = {};  // for a probe's bound

    // Gates of a slice of 16 channels, with tokens where a product sums: gates[0] holds tokens pair and pair + 1 of
    // channel row, gates[1] tokens + 8, gates[2] and [3] the same of channel row + 8.
    const auto load_gates = [&](int slice, uint32_t (&gates)[4]) {
      float g[8];
      if constexpr (L::kWideGate) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int token = pair + i % 2 + i / 2 % 2 * 8;
          const int chunk = slice % 2 * 4 + i / 4 * 2 + row / 4;
          g[i] = load_shared<float>(stage + L::kGateOffset + slice / 2 * kTileBytes + token * 128 +
                                    ((chunk ^ (token % 8)) << 4) + row % 4 * 4);
        }
      } else {
        uint32_t bits[4];
        ldmatrix_x4_trans(
            bits, stage + L::kGateOffset + slice / 4 * kTileBytes + (matrix_address ^ uint32_t(slice % 4 * 32)));
        unpack(g, bits, T{});
      }
      const float bias_low = load_shared<float>(bias_address + (slice * 16 + row) * 4);
      const float bias_high = load_shared<float>(bias_address + (slice * 16 + 8 + row) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float bias = i < 2 ? bias_low : bias_high;
        gates[i] = pack_fp16(gate.template operator()<kBounded>(g[2 * i], bias),
                             gate.template operator()<kBounded>(g[2 * i + 1], bias));
      }
    };

    const auto transform_slice = [&](int slice, const uint32_t (&gates)[4], const uint32_t (&k_bits)[4],
                                     const uint32_t (&q_bits)[4], uint32_t k_address) {
      // Sums of gates, with channels where a product sums: sums[half] rows row, row, row + 8, row + 8; channels pair
      // and pair + 1 of a half.
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

      const float to_last[4] = {last[0], last[1], last[2], last[3]};
      float first[4];
      if constexpr (kBounded) {
#pragma unroll
        for (int i = 0; i < 4; ++i) last[i] *= down_scale;
      } else {
        // The scan needs decays from the chunk's start: those from its middle, times the decay up to there.
        float reference[2][4];
        mma_fp16(reference[0], reference_matrix, gates[0], gates[1], lifts);
        mma_fp16(reference[1], reference_matrix, gates[2], gates[3], lifts);
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
      if constexpr (kProbe) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float from_start = k[i] * (kBounded ? down_scale : first[i / 4 * 2 + i % 2]);
          const float to_end = k_inverse[i] * to_last[i / 4 * 2 + i % 2];
          kd_squares[i / 2 % 2] = fmaf(from_start, from_start, kd_squares[i / 2 % 2]);
          kr_squares[i / 2 % 2] = fmaf(to_end, to_end, kr_squares[i / 2 % 2]);
          largest_decay = fmaxf(largest_decay, last[i / 2]);
        }
      }
      stmatrix_x4(k_address, kd);
      stmatrix_x4(k_address + kQueryOffset, qd);
      stmatrix_x4(k_address - slice / 4 * kTileBytes + L::kGateOffset, kr);
      if (lane >= 28) {
        store_shared(factors + kDecayOffset + (slice * 4 + lane % 4) * 16,
                     make_float4(last[0], last[1], last[2], last[3]));
      }
    };

    // Slices at a time. Kr of two slices covers what g of the first took where g has 32 bits, so both slices' gates
    // come first.
    constexpr int kTogether = L::kWideGate ? 2 : 1;
#pragma unroll 1
    for (int first = 0; first < kHeadDim / 16; first += kTogether) {
      uint32_t gates[kTogether][4];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) load_gates(first + i, gates[i]);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int slice = first + i;
        const uint32_t k_address = stage + slice / 4 * 4096 + (matrix_address ^ uint32_t(slice % 4 * 32));
        uint32_t k_bits[4], q_bits[4];
        ldmatrix_x4(k_bits, k_address);
        ldmatrix_x4(q_bits, k_address + kQueryOffset);
        transform_slice(slice, gates[i], k_bits, q_bits, k_address);
      }
    }

    float beta = bits_to_float(beta_bits, p.beta_dtype);
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
        if constexpr (kProbe) {
          kd_squares[i] += __shfl_xor_sync(0xffffffffu, kd_squares[i], offset);
          kr_squares[i] += __shfl_xor_sync(0xffffffffu, kr_squares[i], offset);
        }
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
        store_shared(factors + kValueScaleOffset + token, kProbe ? sqrtf(kd_squares[i]) : k_norm[i] * up_scale);
        store_shared(factors + kOutputScaleOffset + token, q_inverse_norm[i] * down_scale * p.scale);
        store_shared(factors + kColumnScaleOffset + token, row_beta[i] * k_inverse_norm[i] * down_scale);
      }
    }

    // Both systems X (I + L) = R at once: lane t < 16 has row t of diag(1/n_k), lane 16 + t row t of P diag(1/n_k), and
    // as X they hold rows of AU and PA but for the scale a column. Rows of P travel through the scratch first, then L
    // stays there.
    const uint32_t scratch = factors + kSolveOffset;
    const bool low0 = pair < row, low1 = pair + 1 < row;
    {
      const bool diagonal0 = pair <= row, diagonal1 = pair + 1 <= row;
      float c[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = column_norm[i] * up_scale;
      store_shared(scratch + row * 64 + pair * 4,
                   make_float2(diagonal0 ? p_left[0] * c[0] : 0.f, diagonal1 ? p_left[1] * c[1] : 0.f));
      store_shared(scratch + row * 64 + 32 + pair * 4, make_float2(0.f, 0.f));
      store_shared(scratch + (row + 8) * 64 + pair * 4, make_float2(p_left[2] * c[0], p_left[3] * c[1]));
      store_shared(scratch + (row + 8) * 64 + 32 + pair * 4,
                   make_float2(diagonal0 ? right[2] * c[2] : 0.f, diagonal1 ? right[3] * c[3] : 0.f));
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
        const float4 v = load_shared<float4>(scratch + t * 64 + i * 16);
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
      store_shared(scratch + row * 64 + pair * 4, make_float2(low0 ? l_left[0] * r[0] * column_norm[0] : 0.f,
                                                              low1 ? l_left[1] * r[0] * column_norm[1] : 0.f));
      store_shared(scratch + (row + 8) * 64 + pair * 4,
                   make_float2(l_left[2] * r[1] * column_norm[0], l_left[3] * r[1] * column_norm[1]));
      store_shared(
          scratch + (row + 8) * 64 + 32 + pair * 4,
          make_float2(low0 ? right[0] * r[1] * column_norm[2] : 0.f, low1 ? right[1] * r[1] * column_norm[3] : 0.f));
    }
    __syncwarp();
#pragma unroll
    for (int s = 15; s > 0; --s) {
#pragma unroll
      for (int i = 0; i < (s + 3) / 4; ++i) {
        const float4 v = load_shared<float4>(scratch + s * 64 + i * 16);
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (4 * i + j < s) x[4 * i + j] = fmaf(x[s], values[j], x[4 * i + j]);
        }
      }
    }
    if constexpr (kProbe) {
      // How much of a state can come through the chunk: || diag(d) - sum over s <= t of AU_ts Kd_s Kr_t^T || is at most
      // max(d) + sum |AU_ts| |Kd_s| |Kr_t|. A little is added for the rounding of the factors.
      const float kr_low = __shfl_sync(0xffffffffu, kr_squares[0], lane % 8 * 4);
      const float kr_high = __shfl_sync(0xffffffffu, kr_squares[1], lane % 8 * 4);
      float sum = 0.f;
#pragma unroll
      for (int s = 0; s < 16; ++s) {
        const float column = load_shared<float>(factors + kColumnScaleOffset + s * 4) * up_scale;
        sum = fmaf(fabsf(x[s] * column), load_shared<float>(factors + kValueScaleOffset + s * 4), sum);
      }
      sum = lane < 16 ? sum * sqrtf(lane < 8 ? kr_low : kr_high) : 0.f;
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        largest_decay = fmaxf(largest_decay, __shfl_xor_sync(0xffffffffu, largest_decay, offset));
      }
      __syncwarp();
      if (lane == 0) store_shared(factors + kDecayOffset, 1.02f * (largest_decay + sum));
    }
    uint32_t packed[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 v = load_shared<float4>(factors + kColumnScaleOffset + i * 16);
      packed[2 * i] = pack_bf16(x[4 * i] * v.x, x[4 * i + 1] * v.y);
      packed[2 * i + 1] = pack_bf16(x[4 * i + 2] * v.z, x[4 * i + 3] * v.w);
    }
    __syncwarp();
    store_shared(scratch + lane * 16, make_uint4(packed[0], packed[1], packed[2], packed[3]));
    store_shared(scratch + 512 + lane * 16, make_uint4(packed[4], packed[5], packed[6], packed[7]));

    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    mbarrier_arrive(barriers.ready(cursor.stage));
  }
}

// ---- scan

// A thread holds rows `row` and `row + 8` of its warp's 16, columns 8 j + pair and + 1: element 4 j + 2 i + e is row +
// 8 i, pair + e of column block j.
__device__ __forceinline__ void load_state(float (&state)[2][32], const float* matrix, bool v_first, int row,
                                           int pair) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* s = &state[j / 8][j % 8 * 4 + 2 * i];
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

__device__ __forceinline__ void store_state(const float (&state)[2][32], float* matrix, bool v_first, int row,
                                            int pair) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* s = &state[j / 8][j % 8 * 4 + 2 * i];
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
  using cute::SM90::GMMA::Major;
  using cute::SM90::GMMA::ScaleOut;
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
  uint32_t zero = 0;
  keep(v_matrix);
  keep(o_matrix);
  keep(o_row);
  keep(pair_factors);
  keep(pair_decays);
  keep(o_token);
  keep(zero);
  const int64_t o_chunk = int64_t(kChunk) * p.value_heads * kHeadDim;

  float state[2][32];  // of K, halves
  Cursor<L::kStages> cursor(0);
  mbarrier_wait(barriers.ready(0), 0);
  for (;;) {
    const uint32_t info = shared + L::kFactors + cursor.stage * kFactorBytes + kChunkInfoOffset;
    const uint4 where = load_shared<uint4>(info);
    const uint4 what = load_shared<uint4>(info + 16);
    const int length = int(what.x);
    if (length == kStop) break;
    const int column = (int(what.y) + warpgroup) * 64 + warp * 16;  // of V, this warp's first
    const int64_t matrix = (int64_t(where.w) * p.value_heads + where.z) * (kHeadDim * kHeadDim);
    if (p.initial_state && (what.w & kFromStart)) {
      load_state(state, p.initial_state + matrix, p.state_v_first, column + lane / 4, pair);
    } else {
#pragma unroll
      for (int i = 0; i < 64; ++i) state[i / 32][i % 32] = 0.f;
    }

    // The bf16 copy of half of K that the next chunk multiplies with, and that chunk's decay. Both are done as soon as
    // the half is known and its chunk ready, beside the products of the other half.
    uint32_t copy[32];
    const auto load_decays = [&](int half, uint32_t factor_bytes, float4(&d)[4]) {
#pragma unroll
      for (int m = 0; m < 4; ++m) d[m] = load_shared<float4>(pair_decays + factor_bytes + half * 256 + m * 64);
    };
    const auto copy_and_decay = [&](int half, const float4(&d)[4]) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float* s = &state[half][8 * m];
#pragma unroll
        for (int i = 0; i < 4; ++i) copy[16 * half + 4 * m + i] = pack_bf16(s[2 * i], s[2 * i + 1]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          s[2 * i] *= d[m].x;
          s[2 * i + 1] *= d[m].y;
          s[4 + 2 * i] *= d[m].z;
          s[4 + 2 * i + 1] *= d[m].w;
        }
      }
    };
    if (length > 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4 d[4];
        load_decays(half, cursor.stage * kFactorBytes, d);
        copy_and_decay(half, d);
      }
    }

    // This thread's 16 bytes of o leave a chunk late, where there is time to read them back from shared memory.
    T* o = static_cast<T*>(p.o) + column + lane % 2 * 8 +
           ((int64_t(where.y) * p.tokens + where.x + lane / 2 - kChunk) * p.value_heads + where.z) * kHeadDim;
    bool o_waits = false;
    const auto store_o = [&] {
      const uint4 row = load_shared<uint4>(o_row);
      if (o_waits) *reinterpret_cast<uint4*>(o) = row;
      o += o_chunk;
    };

    const int written = length - int(what.z);
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
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          cute::GmmaDescriptor b = keys;
          b.reg32_[0] += (m / 4 * 4096 + m % 4 * 32) / 16;
          wgmma<Major::K>(both, copy + 4 * m, b, m == 0 ? ScaleOut::Zero : ScaleOut::One);
        }
        cute::warpgroup_commit_batch();

        store_o();
        o_waits = int(o_token) < left && left <= written;
        uint32_t v_bits[4];
        ldmatrix_x4_trans(v_bits, v_address);
        const float2 v_scale[2] = {load_shared<float2>(factors + kValueScaleOffset),
                                   load_shared<float2>(factors + kValueScaleOffset + 32)};
        float v[8];
        unpack(v, v_bits, T{});
        cute::warpgroup_wait<0>();

        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          w[i] = pack_bf16(fmaf(v[2 * i], v_scale[i / 2].x, both[2 * i]),
                           fmaf(v[2 * i + 1], v_scale[i / 2].y, both[2 * i + 1]));
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) both[i] = __uint_as_float(zero);
        // U and the rest of O.
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
          load_decays(0, cursor.stage * kFactorBytes, d0);
          cute::warpgroup_wait<1>();
          copy_and_decay(0, d0);
          load_decays(1, cursor.stage * kFactorBytes, d1);
          cute::warpgroup_wait<0>();
          copy_and_decay(1, d1);
        } else {
          cute::warpgroup_wait<0>();
        }
      }
      __syncwarp();
      mbarrier_arrive(empty);
    }
    store_o();
    if (p.final_state && (what.w & kToEnd))
      store_state(state, p.final_state + matrix, p.state_v_first, column + lane / 4, pair);
    mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
  }

  // Rows outside every sequence.
  if (p.cu_seqlens) {
    cudaGridDependencySynchronize();
    const int* offsets =
        reinterpret_cast<const int*>(static_cast<const char*>(p.workspace) + workspace_layout(p.sequences).offsets);
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

// ---- probe

// In place of the scan: the bounds of the chunks before a segment, one thread.
template <typename G>
__device__ void collect(const Arguments& arguments, uint32_t shared, Barriers barriers) {
  using L = Layout<G, 1>;
  // What is left of a state 2^-24 times as large as before is below its fp32 rounding.
  constexpr float kForgotten = 5.9604644775390625e-8f;
  Cursor<L::kStages> cursor(0);
  float bounds[kProbedChunks] = {};
  for (;; cursor.advance(1)) {
    const uint32_t factors = shared + L::kFactors + cursor.stage * kFactorBytes;
    mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
    const uint4 where = load_shared<uint4>(factors + kChunkInfoOffset);
    const uint4 what = load_shared<uint4>(factors + kChunkInfoOffset + 16);
    const int left = int(what.x);
    if (left == kStop) return;
#pragma unroll
    for (int i = kProbedChunks - 1; i > 0; --i) bounds[i] = bounds[i - 1];
    bounds[0] = load_shared<float>(factors + kDecayOffset);
    mbarrier_arrive(barriers.empty(cursor.stage));
    if (left > kChunk) continue;
    // bounds[i] is the chunk i + 1 before the segment; those of fewer than kProbedChunks are 0 from the start or
    // another item's.
    const int segment = int(what.y);
    const int chunks = min(kProbedChunks, segment * arguments.segment_chunks);
    float product = 1.f;
    int warm_up = 0;
#pragma unroll
    for (int i = 0; i < kProbedChunks; ++i) {
      product *= bounds[i];
      if (warm_up == 0 && i < chunks && product <= kForgotten) warm_up = i + 1;
    }
    arguments.warm_ups[(int(where.w) * arguments.p.value_heads + int(where.z)) * arguments.segments + segment] =
        warm_up;
  }
}

// With kProbe: the same pipeline ahead of the true one, for a few chunks before each segment, to find out which of them
// forget.
template <typename T, typename G, bool kBounded, int kScans, bool kProbe>
__global__ void __launch_bounds__(kThreads, 1) chunk_kda_fwd_kernel(const __grid_constant__ Arguments arguments) {
  using L = Layout<G, kScans>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* base = unaligned + ((1024 - (cute::cast_smem_ptr_to_uint(unaligned) & 1023)) & 1023);
  const uint32_t shared = cute::cast_smem_ptr_to_uint(base);
  const Barriers barriers{shared + L::kBarriers, L::kStages};

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::kStages; ++stage) {
      mbarrier_init(barriers.full(stage), 1);
      mbarrier_init(barriers.ready(stage), 32);
      mbarrier_init(barriers.empty(stage), kProbe ? 1 : kScans * 4 * 32);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if constexpr (kProbe) cudaTriggerProgrammaticLaunchCompletion();

  const int warp = threadIdx.x / 32;
  if (warp < kScans * 4) {
    cutlass::arch::warpgroup_reg_alloc<L::kScanRegisters>();
    if constexpr (kProbe) {
      if (threadIdx.x == 0) collect<G>(arguments, shared, barriers);
    } else {
      scan<T, G, kScans>(arguments.p, shared, barriers);
    }
  } else {
    cutlass::arch::warpgroup_reg_dealloc<L::kTransformRegisters>();
    const int role = warp - kScans * 4;
    if (role < L::kTransformWarps) {
      transform<T, G, kBounded, kScans, kProbe>(arguments.p, shared, shared + L::kBias + role * kHeadDim * 4, barriers,
                                                role);
    } else if (role == L::kTransformWarps && threadIdx.x % 32 == 0) {
      load<G, kScans, kProbe>(arguments, shared, reinterpret_cast<ChunkInfo*>(base + L::kFactors + kChunkInfoOffset),
                              barriers);
    }
  }
}

// ---- host

template <typename T, typename G, bool kBounded, int kScans, bool kProbe>
cudaError_t launch_grid(const Arguments& arguments, int grid, bool overlap, cudaStream_t stream) {
  constexpr int kBytes = Layout<G, kScans>::kBytes;
  const auto kernel = chunk_kda_fwd_kernel<T, G, kBounded, kScans, kProbe>;
  // Once a device; again does no harm.
  static std::atomic<uint64_t> devices{0};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = uint64_t(1) << (device % 64);
  if (device >= 64 || !(devices.load() & bit)) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    devices.fetch_or(bit);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <typename T, typename G, bool kBounded, int kScans>
cudaError_t launch(const ChunkKdaFwdParams& p, const Plan& plan, cudaStream_t stream) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr CUtensorMapDataType type = kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  constexpr CUtensorMapDataType g_type = sizeof(G) == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : type;
  Arguments arguments;
  arguments.p = p;
  arguments.segments = plan.segments;
  arguments.segment_chunks = plan.segment_chunks;
  arguments.warm_ups = plan.segments > 1 ? static_cast<int*>(p.workspace) : nullptr;
  const bool encoded = encode_tiles(&arguments.q, p.q, type, 2, p.batch, p.tokens, p.heads, p.q_stride) &&
                       encode_tiles(&arguments.k, p.k, type, 2, p.batch, p.tokens, p.heads, p.k_stride) &&
                       encode_tiles(&arguments.v, p.v, type, 2, p.batch, p.tokens, p.value_heads, p.v_stride) &&
                       encode_tiles(&arguments.g, p.g, g_type, sizeof(G), p.batch, p.tokens, p.value_heads, p.g_stride);
  if (!encoded) return cudaErrorInvalidValue;

  if constexpr (kScans == 1) {
    if (plan.segments > 1) {
      const cudaError_t error = launch_grid<T, G, kBounded, 1, true>(arguments, plan.probe_grid, false, stream);
      if (error != cudaSuccess) return error;
    }
  }
  const bool overlap = p.cu_seqlens || plan.segments > 1;  // with the plan, or the probe
  return launch_grid<T, G, kBounded, kScans, false>(arguments, plan.grid, overlap, stream);
}

}  // namespace flashkda::chunk_kda_fwd
