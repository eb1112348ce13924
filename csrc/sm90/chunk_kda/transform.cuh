// The warps that turn a chunk's q, k, g into the factors of its products.
#pragma once

#include <cutlass/arch/barrier.h>

#include <type_traits>

#include "common/hopper.cuh"
#include "common/math.cuh"
#include "common/memory.cuh"
#include "params.h"
#include "sm90/chunk_kda/pipeline.cuh"

namespace flashkda::chunk_kda {

// The log decay in units of log2(e) / kGateUnit, from g as loaded. `bias` as stage_bias left it.
struct GateFunction {
  Gate mode;
  float factor;
  float inverse;

  __device__ GateFunction(const ChunkKdaParams& p)
      : mode(p.gate), factor(0.f), inverse(1.f / (p.lower_bound * kLog2e * kGateUnit)) {}

  template <bool kBounded>
  __device__ __forceinline__ void set_head(const ChunkKdaParams& p, int value_head) {
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
      if (mode == Gate::kPrecomputed) return max_or_nan(g * (kLog2e * kGateUnit), kLowest);
      return max_or_nan(softplus_inline(g + bias) * factor, kLowest);
    }
  }
};

// A warp's chunks, from the `warp`th in steps of as many as there are transform warps. Of kStates, the way forward
// needs no q, and the way back leaves P where the others have PA. kTransition needs no q, and v n_k in place of v. Of
// kShares, `attempt` is chunk_kda_fwd/shares.cuh's, and `first_head` what the block begins with, if not negative.
template <typename T, typename L, bool kBounded, Pass kPass>
__device__ void transform(const ChunkKdaParams& p, uint32_t shared, uint32_t bias_address, Barriers barriers,
                          Cursor<L::kStages>& cursor, [[maybe_unused]] Attempt attempt = {},
                          [[maybe_unused]] int first_head = -1) {
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
  const auto set_head = [&](int value_head) {
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
  };
  if constexpr (kPass == Pass::kShares) {
    if (first_head >= 0) set_head(first_head);  // while its tokens are on their way
  }

  for (;; cursor.advance(L::kTransformWarps)) {
    const uint32_t stage = shared + cursor.stage * L::kStageBytes;
    const uint32_t factors = shared + L::kFactors + cursor.stage * kFactorBytes;
    // A warp may be here before the bytes that this stage had last, which another warp waits for: by their parity alone
    // it would take those for its own. So not before the scan is done with those, as the loader.
    mbarrier_wait(barriers.empty(cursor.stage), cursor.parity ^ 1);
    mbarrier_wait(barriers.full(cursor.stage), cursor.parity);
    const uint4 where = load_shared<uint4>(factors + kChunkInfoOffset);
    const int left = load_shared<int>(factors + kChunkInfoOffset + offsetof(ChunkInfo, left));
    if (left <= 0) {  // an empty sequence, or the end
      __syncwarp();
      mbarrier_arrive(barriers.ready(cursor.stage));
      if (left == kStop) return;
      continue;
    }
    constexpr bool kHasFlags = kPass == Pass::kStates || kPass == Pass::kShares;
    const int flags = kHasFlags ? load_shared<int>(factors + kChunkInfoOffset + offsetof(ChunkInfo, flags)) : 0;
    const bool reverse = kPass == Pass::kStates && flags & kReverse;
    const int valid = min(left, kChunk);
    const int value_head = int(where.z);
    const bool warms_up = flags & kWarmsUp;
    // Of kWarmsUp, for a bound of R: the largest decay, and squares of rows of Kd and Kr, two channels' sums apart.
    [[maybe_unused]] float kept = 0.f;
    [[maybe_unused]] uint32_t kd_squares[2] = {}, kr_squares[2] = {};

    // Token lane % 16's beta, on its way while the loop runs.
    const int beta_token = lane % 16;
    const int64_t beta_index = int64_t(where.y) * p.beta_stride.batch +
                               int64_t(where.x + min(beta_token, valid - 1)) * p.beta_stride.token +
                               value_head * p.beta_stride.head;
    const uint32_t beta_bits = load_bits(p.beta, beta_index, p.beta_dtype == Dtype::kFloat32);

    if (value_head != bias_head) set_head(value_head);

    // Rows past the end are another sequence's, or padding that may hold NaN: nothing of them may enter a product. A
    // gate of zero may still decay, so its tokens leave the sums as well.
    uint32_t sum_matrix[4] = {whole_sum_matrix[0], whole_sum_matrix[1], 0u, whole_sum_matrix[2]};
    uint32_t reference_matrix[4] = {ones, ones, 0u, 0u};
    if (valid < kChunk) {
#pragma unroll 1
      for (int tile = 0; tile < L::kStageBytes / kTileBytes; ++tile) {
#pragma unroll 1
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

    const auto transform_slice = [&](auto with_query, int slice, const uint32_t (&gates)[4],
                                     const uint32_t (&k_bits)[4], const uint32_t (&q_bits)[4], uint32_t k_address) {
      constexpr bool kQuery = decltype(with_query)::value;
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
      if constexpr (kQuery) unpack(q, q_bits, T{});
      float k_inverse[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        k_squares[i / 2 % 2] = fmaf(k[i], k[i], k_squares[i / 2 % 2]);
        if constexpr (kQuery) q_squares[i / 2 % 2] = fmaf(q[i], q[i], q_squares[i / 2 % 2]);
        k_inverse[i] = k[i] * down[i];
        k[i] *= -up[i];
        if constexpr (kQuery) q[i] *= up[i];
      }
      uint32_t kd[4], qd[4] = {}, ki[4], kr[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        kd[i] = pack_bf16(k[2 * i], k[2 * i + 1]);
        if constexpr (kQuery) qd[i] = pack_bf16(q[2 * i], q[2 * i + 1]);
        ki[i] = pack_bf16(k_inverse[2 * i], k_inverse[2 * i + 1]);
        kr[i] = pack_bf16(k_inverse[2 * i] * last[i / 2 * 2], k_inverse[2 * i + 1] * last[i / 2 * 2 + 1]);
      }
      mma_bf16(l_left, kd[0], kd[1], kd[2], kd[3], ki[0], ki[2]);
      if constexpr (kQuery) mma_bf16(p_left, qd[0], qd[1], qd[2], qd[3], ki[0], ki[2]);
      mma_bf16(right, kd[1], qd[1], kd[3], qd[3], ki[1], ki[3]);

      if constexpr (kBounded) {
#pragma unroll
        for (int i = 0; i < 4; ++i) last[i] *= down_scale;
      } else {
        // The scan needs decays from the chunk's start: those from its middle, times the decay up to there.
        float reference[2][4], first[4];
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
          if constexpr (kQuery) qd[i] = pack_bf16(q[2 * i] * first[i / 2 * 2], q[2 * i + 1] * first[i / 2 * 2 + 1]);
        }
      }
      if constexpr (kPass == Pass::kShares) {
        if (warms_up) {
          kept = fmaxf(fmaxf(fmaxf(last[0], last[1]), fmaxf(last[2], last[3])), kept);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t lowered = kBounded ? multiply_bf16(kd[i], pack_bf16(down_scale, down_scale)) : kd[i];
            kd_squares[i % 2] = add_square_bf16(lowered, kd_squares[i % 2]);
            kr_squares[i % 2] = add_square_bf16(kr[i], kr_squares[i % 2]);
          }
        }
      }
      stmatrix_x4(k_address, kd);
      if constexpr (kQuery) stmatrix_x4(k_address + kQueryOffset, qd);
      stmatrix_x4(k_address - slice / 4 * kTileBytes + L::kGateOffset, kr);
      if (lane >= 28) {
        store_shared(factors + kDecayOffset + (slice * 4 + lane % 4) * 16,
                     make_float4(last[0], last[1], last[2], last[3]));
      }
    };

    // Slices at a time. Transitions of fast gates end before a second chunk is there to hide the latency of the first;
    // beside two scans 7 warps transform, and hide less of it than 11, where they have the registers. (Where g has 32
    // bits, Kr of a slice lies where g of a slice half as far lay, which has been read.)
    constexpr bool kFewWarps = kPass != Pass::kStates && L::kScans == 2 && L::kTransformRegisters >= 112;
    constexpr int kTogether = !L::kWideGate && (kPass == Pass::kTransition || kFewWarps) ? 2 : 1;
    [[maybe_unused]] bool given_up = false;
    const auto transform_slices = [&](auto with_query) {
#pragma unroll 1
      for (int first = 0; first < kHeadDim / 16; first += kTogether) {
        if constexpr (kPass == Pass::kShares) {
          if (flags & kTried) {
            given_up = attempt.give_up(__any_sync(0xffffffffu, kept > load_shared<float>(attempt.most())));
            if (given_up) return;
          }
        }
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
          if constexpr (decltype(with_query)::value) ldmatrix_x4(q_bits, k_address + kQueryOffset);
          transform_slice(with_query, slice, gates[i], k_bits, q_bits, k_address);
        }
      }
    };
    if constexpr (kPass == Pass::kTransition) {
      transform_slices(std::false_type{});
    } else if constexpr (kPass == Pass::kStates) {
      if (reverse) {
        transform_slices(std::true_type{});
      } else {
        transform_slices(std::false_type{});
      }
    } else {
      transform_slices(std::true_type{});
    }
    if constexpr (kPass == Pass::kShares) {
      if (given_up) {  // nobody reads these factors
        cutlass::arch::fence_view_async_shared();
        __syncwarp();
        mbarrier_arrive(barriers.ready(cursor.stage));
        continue;
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
      }
      const float k_square = p.qk_l2norm ? k_squares[i] + 1e-6f : 1.f;
      const float q_square = p.qk_l2norm ? q_squares[i] + 1e-6f : 1.f;
      k_inverse_norm[i] = rsqrt(k_square);
      q_inverse_norm[i] = rsqrt(q_square);
      k_norm[i] = k_square * k_inverse_norm[i];
    }
    if constexpr (kPass == Pass::kTransition) {
#pragma unroll
      for (int slice = 0; slice < kHeadDim / 16; ++slice) {
        const uint32_t v_address = stage + L::value_offset(slice / 4) + (matrix_address ^ uint32_t(slice % 4 * 32));
        uint32_t v_bits[4];
        ldmatrix_x4(v_bits, v_address);
        float v[8];
        unpack(v, v_bits, T{});
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scale = k_norm[i % 2] * up_scale;
          v_bits[i] = pack_bf16(v[2 * i] * scale, v[2 * i + 1] * scale);
        }
        stmatrix_x4(v_address, v_bits);
      }
    }
    float c[2];  // beta / n_k^2
#pragma unroll
    for (int i = 0; i < 2; ++i)
      c[i] = __shfl_sync(0xffffffffu, beta, row + 8 * i) * k_inverse_norm[i] * k_inverse_norm[i];
    if (lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t token = (row + 8 * i) * 4;
        const float value_scale = k_norm[i] * up_scale;
        store_shared(factors + kValueScaleOffset + token, value_scale);
        store_shared(factors + kOutputScaleOffset + token, q_inverse_norm[i] * down_scale * p.scale);
        store_shared(factors + kColumnScaleOffset + token, c[i] * down_scale);
      }
    }

    // Both systems X (I + L) = R at once: lane t < 16 has row t of I, lane 16 + t row t of P, lifted, and as X they
    // hold rows of A and PA. In reverse the upper lanes keep theirs. Rows of P travel through the scratch first, then L
    // stays there.
    const uint32_t scratch = factors + kSolveOffset;
    const bool keeps_rows = reverse && lane >= 16;
    const bool low0 = pair < row, low1 = pair + 1 < row;
    {
      const bool diagonal0 = pair <= row, diagonal1 = pair + 1 <= row;
      store_shared(scratch + row * 64 + pair * 4,
                   make_float2(diagonal0 ? p_left[0] * up_scale : 0.f, diagonal1 ? p_left[1] * up_scale : 0.f));
      store_shared(scratch + row * 64 + 32 + pair * 4, make_float2(0.f, 0.f));
      store_shared(scratch + (row + 8) * 64 + pair * 4, make_float2(p_left[2] * up_scale, p_left[3] * up_scale));
      store_shared(scratch + (row + 8) * 64 + 32 + pair * 4,
                   make_float2(diagonal0 ? right[2] * up_scale : 0.f, diagonal1 ? right[3] * up_scale : 0.f));
    }
    __syncwarp();
    float x[16];
    {
      uint32_t t = lane % 16;
      keep(t);  // or rows of the identity are kept in registers from chunk to chunk
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 v = load_shared<float4>(scratch + t * 64 + i * 16);
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) x[4 * i + j] = lane >= 16 ? values[j] : (4 * i + j == t ? 1.f : 0.f);
      }
    }
    __syncwarp();
    {
      // Minus c Kd Ki^T, since Kd carries a minus.
      store_shared(scratch + row * 64 + pair * 4,
                   make_float2(low0 ? l_left[0] * c[0] : 0.f, low1 ? l_left[1] * c[0] : 0.f));
      store_shared(scratch + (row + 8) * 64 + pair * 4, make_float2(l_left[2] * c[1], l_left[3] * c[1]));
      store_shared(scratch + (row + 8) * 64 + 32 + pair * 4,
                   make_float2(low0 ? right[0] * c[1] : 0.f, low1 ? right[1] * c[1] : 0.f));
    }
    __syncwarp();
#pragma unroll
    for (int s = 15; s > 0; --s) {
      const float solved = keeps_rows ? 0.f : x[s];
#pragma unroll
      for (int i = 0; i < (s + 3) / 4; ++i) {
        const float4 v = load_shared<float4>(scratch + s * 64 + i * 16);
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (4 * i + j < s) x[4 * i + j] = fmaf(solved, values[j], x[4 * i + j]);
        }
      }
    }
    if constexpr (kPass == Pass::kShares) {
      if (warms_up) {
        // R = d - sum over i >= j of A_ij c_j Kd_j^T Kr_i, so |R| <= max d + sum |A_ij| |c_j| |Kd_j| |Kr_i|.
        float read[2], written[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 kd = unpack_bf16(kd_squares[i]), kr = unpack_bf16(kr_squares[i]);
          read[i] = kd.x + kd.y;
          written[i] = kr.x + kr.y;
#pragma unroll
          for (int offset = 1; offset < 4; offset *= 2) {
            read[i] += __shfl_xor_sync(0xffffffffu, read[i], offset);
            written[i] += __shfl_xor_sync(0xffffffffu, written[i], offset);
          }
          read[i] = flashkda::sqrt(read[i]) * fabsf(c[i]);
        }
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) sum = fmaf(fabsf(x[j]), __shfl_sync(0xffffffffu, read[j / 8], j % 8 * 4), sum);
        const float written_low = __shfl_sync(0xffffffffu, written[0], lane % 8 * 4);
        const float written_high = __shfl_sync(0xffffffffu, written[1], lane % 8 * 4);
        sum = lane < 16 ? sum * flashkda::sqrt(lane < 8 ? written_low : written_high) : 0.f;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, offset);
          kept = fmaxf(kept, __shfl_xor_sync(0xffffffffu, kept, offset));
        }
        if (lane == 0) store_shared(factors + kChunkInfoOffset + offsetof(ChunkInfo, kept), kept + sum);
      }
    }
    // A leaves less I, which the scan adds in fp32; rows of P and PA lifted, as Qd is: what they meet is lowered.
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = i == lane ? 0.f : x[i];
    uint32_t packed[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) packed[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    __syncwarp();
    store_shared(scratch + lane * 16, make_uint4(packed[0], packed[1], packed[2], packed[3]));
    store_shared(scratch + 512 + lane * 16, make_uint4(packed[4], packed[5], packed[6], packed[7]));

    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    mbarrier_arrive(barriers.ready(cursor.stage));
  }
}

}  // namespace flashkda::chunk_kda
