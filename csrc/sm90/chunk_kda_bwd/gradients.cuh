// The gradients of a tile of 64 tokens of one value head, from the state S that enters it and the gradient dS' of the
// state that leaves it. Tiles are independent; one block a multiprocessor works through them.
//
// With G the cumulative log decay inside the tile, decays between tokens taken as exp(G_i - G_j), k and q normalised
// and q scaled, L = strict_lower(diag(beta) N), P and N the decayed products of q and of k with earlier k:
//
//   W  = V - Kd S^T         Kd = k exp(G)               (I + L) U = diag(beta) W
//   dU = P^T dO + Kr dS'^T  Kr = k exp(G_last - G)      (I + L)^T Y = dU
//   dV = dW = diag(beta) Y        dP = lower(dO U^T)    dN = -diag(beta) strict_lower(Y U^T)
//   dbeta = rowsum(Y * W) - rowsum(strict_lower(Y U^T) * N)
//   dq = exp(G) * dO S + sum over j <= i of dP_ij decay_ij k_j
//   dk = up + down    up   = -exp(G) * dW S + sum over j < i of dN_ij decay_ij k_j
//                     down = exp(G_last - G) * U dS' + sum over i > j of decay_ij (dN_ij k_i + dP_ij q_i)
//   dG = q dq + k up - k down, the last row + colsum(Kr * U dS') + exp(G_last) colsum(dS' * S)
//   dg = reverse cumulative sum of dG
//
// Everything is transposed, as in the forward scan: rows of a product are channels (of V, then of K), columns tokens.
// A warp owns 16 channels of every token, so that both solves, the sums over tokens and the products inside the tile
// need no other warp. Its loops go over blocks of 16 tokens and are not unrolled: the whole tile as straight-line code
// is 130 KB, more than the instruction cache holds.
//
// Normalisation costs no rounding: operands hold q and k as they came, but for a power of two, and a token's factor
// goes into P, N and their gradients, into W, dU, and what comes through the states. dq and dk are then gradients times
// that factor, which is what the derivative of the normalisation wants.
//
// Between blocks of 16 tokens L is the sum of two bf16, the second in the mirrored block above the diagonal: with
// nearly parallel keys its rounding is what would count most.
//
// Decays inside the tile are split at a token between the two, so that both factors are at most 1: at the middle of
// the tile (level 1), of its halves (level 2), and inside the four blocks of 16 tokens at their middle (level 3, where
// both factors stay in range). With bounded gates they stay in range inside a half as well, so that level 3 falls to
// level 2. Of a pair of tokens the later is a row, the earlier a column. The products with dP and
// dN use the same rounded factors on both sides, so that what a pair adds to dG of one token it takes from the other's
// exactly, and the cumulative sums cancel as they should.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <type_traits>

#include "common/elements.cuh"
#include "common/hopper.cuh"
#include "common/launch.h"
#include "common/math.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda/tensor_map.h"
#include "sm90/chunk_kda_bwd/config.h"
#include "sm90/chunk_kda_bwd/gradient_tiles.cuh"
#include "sm90/chunk_kda_bwd/launch.h"

namespace flashkda::chunk_kda_bwd {

// A thread's elements n of a warp's 16 channels x 64 tokens: channel lane / 4 + 8 (n / 2 % 2), token 16 (n / 8) + 8 (n
// / 4 % 2) + lane % 4 * 2 + n % 2. Those of a block of 16 tokens, packed in pairs, are the A operand of a product over
// its tokens.
constexpr int kElements = 32;

__device__ __forceinline__ void math_sync() { cutlass::arch::NamedBarrier::sync(kMathThreads, kMath); }

__device__ __forceinline__ void pack_block(uint32_t (&bits)[4], const float* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}

// One number a token: those of element n's at [n / 4 * 2 + n % 2].
__device__ __forceinline__ float2 token_pair(uint32_t array, int j) { return load_shared<float2>(array + 32 * j); }

// d[16 x 16] += a[16 x 16] b^T, as two accumulators of 8 columns. b as ldmatrix_x4 reads a row-major 16 x 16 block
// whose rows are d's columns.
__device__ __forceinline__ void multiply_rows(float* d, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_bf16(*reinterpret_cast<float (*)[4]>(d), a[0], a[1], a[2], a[3], b[0], b[2]);
  mma_bf16(*reinterpret_cast<float (*)[4]>(d + 4), a[0], a[1], a[2], a[3], b[1], b[3]);
}

// The same with b, whose columns are d's columns, as ldmatrix_x4_trans reads it.
__device__ __forceinline__ void multiply_columns(float* d, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_bf16(*reinterpret_cast<float (*)[4]>(d), a[0], a[1], a[2], a[3], b[0], b[1]);
  mma_bf16(*reinterpret_cast<float (*)[4]>(d + 4), a[0], a[1], a[2], a[3], b[2], b[3]);
}

// ---- gates

// The log decay in units of log2(e), and its derivatives.
struct Decay {
  Gate mode;
  float bound;  // lower_bound
  float rate;   // exp(A_log)

  // z = g + dt_bias, or g.
  __device__ __forceinline__ float operator()(float z) const {
    constexpr float kLowest = chunk_kda::kLowestLogDecay * kLog2e;
    if (mode == Gate::kBounded) return bound * kLog2e * rcp(1.f + ex2(-rate * kLog2e * z));
    if (mode == Gate::kPrecomputed) return max_or_nan(z * kLog2e, kLowest);
    return max_or_nan(-rate * kLog2e * softplus_inline(z), kLowest);
  }
  // The gradients by z and, as `by_rate`, by A_log, where `d` is that by the log decay.
  __device__ __forceinline__ float backward(float z, float d, float& by_rate) const {
    if (mode == Gate::kBounded) {
      const float s = rcp(1.f + ex2(-rate * kLog2e * z));
      const float slope = s * (1.f - s);
      const float dz = d * bound * slope * rate;
      by_rate = dz * z;
      return dz;
    }
    if (mode == Gate::kPrecomputed) return d;
    by_rate = -d * rate * softplus_inline(z);
    return -d * rate * sigmoid(z);
  }
};

// ---- math

// A step of a butterfly that halves what is carried: lanes with the bit `kMask` keep the upper kCount of x, the others
// the lower, each with its partner's share.
template <int kCount, int kMask, int kSize>
__device__ __forceinline__ void add_halves(float (&x)[kSize], int lane) {
  const bool upper = lane & kMask;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float send = upper ? x[i] : x[i + kCount];
    const float keep = upper ? x[i + kCount] : x[i];
    x[i] = keep + __shfl_xor_sync(0xffffffffu, send, kMask);
  }
}

// acc[16 x 16] = 16 rows of `a` times 16 rows of `b`, over 128 channels; halves of 64 channels lie `half` bytes apart.
// Addresses of the blocks; `matrix` is a lane's part for ldmatrix.
__device__ __forceinline__ void multiply_blocks(float (&acc)[8], uint32_t a, int a_half, uint32_t b, int b_half,
                                                uint32_t matrix) {
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i] = 0.f;
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    uint32_t x[4], y[4];
    ldmatrix_x4(x, a + s / 4 * a_half + (matrix ^ uint32_t(s % 4 * 32)));
    ldmatrix_x4(y, b + s / 4 * b_half + (matrix ^ uint32_t(s % 4 * 32)));
    multiply_rows(acc, x, y);
  }
}

// Swaps the halves of the elements, so that a loop over them need not be unrolled.
__device__ __forceinline__ void turn(float (&x)[kElements]) {
#pragma unroll
  for (int i = 0; i < kElements / 2; ++i) {
    const float first = x[i];
    x[i] = x[i + kElements / 2];
    x[i + kElements / 2] = first;
  }
}

// Moves the last of the four blocks to the front.
__device__ __forceinline__ void turn_back(float (&x)[kElements]) {
  constexpr int kBlock = kElements / kBlocks;
  float last[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) last[i] = x[kElements - kBlock + i];
#pragma unroll
  for (int i = kElements - 1; i >= kBlock; --i) x[i] = x[i - kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) x[i] = last[i];
}

template <typename T, typename G, bool kBounded>
__device__ void differentiate(const GradientArguments& arguments, uint32_t shared, GradientBarriers barriers) {
  using L = GradientLayout<G>;
  using cute::SM90::GMMA::Major;
  using cute::SM90::GMMA::ScaleOut;
  const ChunkKdaBwdParams& p = arguments.p;
  const int thread = threadIdx.x;
  const int warpgroup = thread / 128, warp = thread / 32, lane = thread % 32;
  const int row = lane / 4, pair = lane % 4 * 2;
  const int channel = warp * 16 + row;  // and + 8

  // A lane's part of an address of 16 x 16 elements: for what is read as it lies, and of this warp's channels of a
  // block for what is transposed on the way.
  const uint32_t matrix = lane % 16 * 128 + (uint32_t((lane / 16) ^ (lane % 8)) << 4);
  const int matrix_token = lane % 8 + lane / 16 * 8;
  const uint32_t mine_in_half =
      matrix_token * 128 + ((uint32_t(warp % 4 * 2 + lane / 8 % 2) ^ (matrix_token % 8)) << 4);
  const uint32_t mine = warpgroup * kHalfBytes + mine_in_half;
  const uint32_t mine_of_two = warpgroup * (kHalfBytes / 2) + mine_in_half;  // of two blocks alone
  const uint32_t work = shared + L::kWork;
  const uint32_t decays = shared + L::kDecays + thread * 16;
  const uint32_t references = shared + L::kReferences + channel * 4;
  const auto block_of = [&](uint32_t square, int i, int j) {  // of a 64 x 64 matrix, for ldmatrix
    return square + i * kBlockBytes + (matrix ^ uint32_t(j * 32));
  };

  uint32_t parity = 0;
  int slot = 0, image_count = 0;
  for (TileWalk walk = walk_tiles(arguments); walk.is_left(); walk.advance(), parity ^= 1, slot ^= 1, ++image_count) {
    mbarrier_wait(barriers.full_keys(), parity);
    const uint4 where = load_shared<uint4>(shared + L::kInfo + slot * 16);
    const int valid = int(where.z), image = int(where.w);
    const int value_head = image % p.value_heads;
    // Used after g has come.
    const float A_log = p.A_log ? p.A_log[value_head] : 0.f;
    float bias[2] = {};
    if (p.dt_bias) {
      bias[0] = p.dt_bias[int64_t(value_head) * kHeadDim + channel];
      bias[1] = p.dt_bias[int64_t(value_head) * kHeadDim + channel + 8];
    }
    const uint32_t this_beta = L::kBeta + image_count % 3 * 4 * kTile;
    const int64_t first_row = int64_t(where.y) * p.tokens + where.x;  // of an output, of this tile

    // q and k in place times a power of two that leaves no element above 1; zeros in rows that are not the sequence's.
    // Four threads a token.
    {
      const int token = thread / 4, quarter = thread % 4;
#pragma unroll 1
      for (int which = 0; which < 2; ++which) {
        const uint32_t tensor = shared + (which ? L::kKey : L::kQuery) + quarter / 2 * kHalfBytes + token * 128;
        const auto address = [&](int i) {  // no two of 8 neighbouring threads in the same banks
          return tensor + ((uint32_t(quarter % 2 * 4 + (i ^ (quarter / 2 * 2))) ^ (token % 8)) << 4);
        };
        float x[4][8];
        float square = 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 loaded = load_shared<uint4>(address(i));
          const uint32_t bits[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
          unpack(x[i], bits, T{});
#pragma unroll
          for (int c = 0; c < 8; ++c) square = fmaf(x[i][c], x[i][c], square);
        }
        square += __shfl_xor_sync(0xffffffffu, square, 1);
        square += __shfl_xor_sync(0xffffffffu, square, 2);
        // 2^exponent is 1.4 to 2.9 times sqrt(square), or 1 where there is nothing to scale.
        const bool scalable = square > 1e-30f && square < 1e30f;
        const int exponent = scalable ? (__float_as_int(square) >> 24) - 62 : 0;
        const float unit = power_of_two(-exponent);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t bits[4];
#pragma unroll
          for (int c = 0; c < 8; ++c) x[i][c] = token < valid ? x[i][c] * unit : 0.f;
#pragma unroll
          for (int c = 0; c < 4; ++c) bits[c] = pack(x[i][2 * c], x[i][2 * c + 1], T{});
          store_shared(address(i), make_uint4(bits[0], bits[1], bits[2], bits[3]));
        }
        if (quarter == 0) {
          float norm = (p.qk_l2norm ? rsqrt(square + 1e-6f) : 1.f) * (which ? 1.f : p.scale);
          if (token >= valid) norm = 0.f;
          const uint32_t factor = shared + (which ? L::kKeyFactor : L::kQueryFactor) + token * 4;
          store_shared(factor, norm * power_of_two(exponent));
          store_shared(factor + L::kKeyUnit - L::kKeyFactor, unit);
        }
      }
    }

    // Cumulative log decays, each thread's where only it reads them; g stays in registers, as fp16 where it had 32
    // bits.
    uint32_t x_bits[16];
    mbarrier_wait(barriers.full_gates(), parity);
    const Decay decay{kBounded                       ? Gate::kBounded
                      : p.gate == Gate::kPrecomputed ? Gate::kPrecomputed
                                                     : Gate::kUnbounded,
                      p.lower_bound, flashkda::exp(A_log)};
    {
      float carry[2] = {};
#pragma unroll 1
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t bits[4];
        float x[8], sums[8];
        if constexpr (L::kWideGate) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int token = 16 * b + i / 4 * 8 + pair + i % 2, c = channel + i / 2 % 2 * 8;
            x[i] = load_shared<float>(work + c / 32 * kHalfBytes + token * 128 +
                                      ((uint32_t(c % 32 / 4) ^ (token % 8)) << 4) + c % 4 * 4);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) bits[i] = pack_fp16(x[2 * i], x[2 * i + 1]);
        } else {
          ldmatrix_x4_trans(bits, work + mine + b * kBlockBytes);
          unpack(x, bits, T{});
        }
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          const int half = i / 2 % 2, token = 16 * b + i / 4 * 8 + pair;
          const float x0 = token < valid ? decay(x[i] + bias[half]) : 0.f;
          const float x1 = token + 1 < valid ? decay(x[i + 1] + bias[half]) : 0.f;
          float sum = x0 + x1;
          float other = __shfl_up_sync(0xffffffffu, sum, 1, 4);
          if (lane % 4 >= 1) sum += other;
          other = __shfl_up_sync(0xffffffffu, sum, 2, 4);
          if (lane % 4 >= 2) sum += other;
          other = __shfl_up_sync(0xffffffffu, sum, 1, 4);
          sums[i] = carry[half] + (lane % 4 ? other : 0.f) + x0;
          sums[i + 1] = carry[half] + sum;
          carry[half] = __shfl_sync(0xffffffffu, sums[i + 1], 3, 4);
          if (lane % 4 == 0) store_shared(references + (2 * b + i / 4) * 4 * kHeadDim + half * 32, carry[half]);
        }
        store_shared(decays + b * 8192, make_float4(sums[0], sums[1], sums[2], sums[3]));
        store_shared(decays + b * 8192 + 4096, make_float4(sums[4], sums[5], sums[6], sums[7]));
#pragma unroll
        for (int i = 0; i < 12; ++i) x_bits[i] = x_bits[i + 4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x_bits[12 + i] = bits[i];
      }
    }
    math_sync();

    // A block of this warp's channels.
    const auto read_block = [&](float (&x)[8], uint32_t tensor, int b) {
      uint32_t bits[4];
      ldmatrix_x4_trans(bits, tensor + mine + b * kBlockBytes);
      unpack(x, bits, T{});
    };
    // Times one number a token, of this block.
    const auto times_tokens = [&](float* x, uint32_t array, int b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 y = load_shared<float2>(shared + array + (16 * b + 8 * i + pair) * 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[4 * i + 2 * half] *= y.x;
          x[4 * i + 2 * half + 1] *= y.y;
        }
      }
    };
    const auto read_decays = [&](float (&x)[8], int b) {
      const float4 low = load_shared<float4>(decays + b * 8192), high = load_shared<float4>(decays + b * 8192 + 4096);
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    };
    // exp(G - G_at) with sign 1, exp(G_at - G) with sign -1, where `at` is the end of an eighth of the tile.
    const auto factors = [&](float (&f)[8], const float (&sums)[8], int at, float sign) {
      const float from[2] = {sign * load_shared<float>(references + at * 4 * kHeadDim),
                             sign * load_shared<float>(references + at * 4 * kHeadDim + 32)};
#pragma unroll
      for (int i = 0; i < 8; ++i) f[i] = ex2(fmaf(sign, sums[i], -from[i / 2 % 2]));
    };
    const auto scaled = [&](uint32_t (&bits)[4], const float (&x)[8], const float (&f)[8]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = pack_bf16(x[2 * i] * f[2 * i], x[2 * i + 1] * f[2 * i + 1]);
    };

    // Rows of k, columns of k, rows of q: level 3, and level 2 where the gate is bounded.
#pragma unroll 1
    for (int b = 0; b < kBlocks; ++b) {
      float k[8], q[8], sums[8], f[8];
      uint32_t bits[4];
      read_block(k, shared + L::kKey, b);
      read_block(q, shared + L::kQuery, b);
      read_decays(sums, b);
      const int at = kBounded ? (b < 2 ? 1 : 5) : 2 * b;
      factors(f, sums, at, 1.f);
      scaled(bits, k, f);
      stmatrix_x4_trans(work + mine + b * kBlockBytes, bits);
      scaled(bits, q, f);
      stmatrix_x4_trans(work + 2 * kTensorBytes + mine + b * kBlockBytes, bits);
      factors(f, sums, at, -1.f);
      scaled(bits, k, f);
      stmatrix_x4_trans(work + kTensorBytes + mine + b * kBlockBytes, bits);
    }
    math_sync();

    // Elements of a 16 x 16 product: rows row, row + 8 (i / 2 % 2), columns pair, + 1 (i % 2), + 8 (i / 4).
    const auto store_block = [&](uint32_t square, int i, int j, const float (&x)[8]) {
      const uint32_t bits[4] = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                                pack_bf16(x[6], x[7])};
      stmatrix_x4(block_of(square, i, j), bits);
    };
    const auto row_beta = [&](int block, int half) {
      return load_shared<float>(shared + this_beta + (16 * block + row + 8 * half) * 4);
    };
    // Times the factors of q or k in its rows and of k in its columns.
    const auto times_factors = [&](float (&x)[8], uint32_t rows, int i, int j) {
      const float low = load_shared<float>(shared + rows + (16 * i + row) * 4);
      const float high = load_shared<float>(shared + rows + (16 * i + row + 8) * 4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 column = load_shared<float2>(shared + L::kKeyFactor + (16 * j + 8 * e + pair) * 4);
        x[4 * e] *= low * column.x;
        x[4 * e + 1] *= low * column.y;
        x[4 * e + 2] *= high * column.x;
        x[4 * e + 3] *= high * column.y;
      }
    };
    // N by warps 0 to 3, who keep it, and P by the others: each a diagonal block and a block of level 1, two of them a
    // block of level 2.
    const bool is_N = warp < 4;
    const int diagonal = warp % 4;
    const int row1 = 2 + diagonal / 2, column1 = diagonal % 2;
    const bool has_level2 = diagonal < 2;
    const int row2 = 2 * diagonal + 1, column2 = 2 * diagonal;
    // Of a diagonal block: N and its gradient are zero on the diagonal as well.
    const auto keep_lower = [&](float (&x)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = row + i / 2 % 2 * 8, c = pair + i % 2 + i / 4 * 8;
        x[i] = c < r || (c == r && !is_N) ? x[i] : 0.f;
      }
    };
    const uint32_t row_factors = is_N ? L::kKeyFactor : L::kQueryFactor;
    float N_diagonal[8], N_level1[8], N_level2[8] = {};
    const auto store_score = [&](float (&x)[8], int i, int j) {
      times_factors(x, row_factors, i, j);
      float y[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) y[e] = is_N ? -row_beta(i, e / 2 % 2) * x[e] : x[e];
      store_block(shared + (is_N ? L::kSystem : L::kScores), i, j, y);
      if (is_N) {
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] -= __bfloat162float(__float2bfloat16_rn(y[e]));
        store_block(shared + L::kSystem, j, i, y);
      }
    };
    const uint32_t rows3 = work + (is_N ? 0 : 2 * kTensorBytes), columns3 = work + kTensorBytes;
    multiply_blocks(N_diagonal, rows3 + diagonal * kBlockBytes, kHalfBytes, columns3 + diagonal * kBlockBytes,
                    kHalfBytes, matrix);
    keep_lower(N_diagonal);
    times_factors(N_diagonal, row_factors, diagonal, diagonal);
    if (is_N) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int r = row + i / 2 % 2 * 8, c = pair + i / 4 * 8;
        const float beta = row_beta(diagonal, i / 2 % 2);
        store_shared(shared + L::kSolve + diagonal * L::kSolveStride + r * 64 + c * 4,
                     make_float2(beta * N_diagonal[i], beta * N_diagonal[i + 1]));
      }
    } else {
      store_block(shared + L::kScores, diagonal, diagonal, N_diagonal);
    }
    mbarrier_arrive(barriers.system_ready());
    if (kBounded && has_level2) {
      multiply_blocks(N_level2, rows3 + row2 * kBlockBytes, kHalfBytes, columns3 + column2 * kBlockBytes, kHalfBytes,
                      matrix);
      store_score(N_level2, row2, column2);
    }
    math_sync();

    // Level 1, and level 2 where it has not been: each block is rows or columns. Work: k of level 1, k of level 2, q's
    // rows of level 1, of level 2.
    constexpr int kLevel2 = kTensorBytes, kQuery1 = 2 * kTensorBytes, kQuery2 = kQuery1 + kHalfBytes;
#pragma unroll 1
    for (int b = 0; b < kBlocks; ++b) {
      float k[8], q[8], sums[8], f[8];
      uint32_t bits[4];
      read_block(k, shared + L::kKey, b);
      read_block(q, shared + L::kQuery, b);
      read_decays(sums, b);
      factors(f, sums, 3, b < 2 ? -1.f : 1.f);
      scaled(bits, k, f);
      stmatrix_x4_trans(work + mine + b * kBlockBytes, bits);
      if (b >= 2) {
        scaled(bits, q, f);
        stmatrix_x4_trans(work + kQuery1 + mine_of_two + (b - 2) * kBlockBytes, bits);
      }
      if constexpr (!kBounded) {
        factors(f, sums, b < 2 ? 1 : 5, b % 2 ? 1.f : -1.f);
        scaled(bits, k, f);
        stmatrix_x4_trans(work + kLevel2 + mine + b * kBlockBytes, bits);
        if (b % 2) {
          scaled(bits, q, f);
          stmatrix_x4_trans(work + kQuery2 + mine_of_two + b / 2 * kBlockBytes, bits);
        }
      }
    }
    math_sync();

    multiply_blocks(N_level1, is_N ? work + row1 * kBlockBytes : work + kQuery1 + (row1 - 2) * kBlockBytes,
                    is_N ? kHalfBytes : kHalfBytes / 2, work + column1 * kBlockBytes, kHalfBytes, matrix);
    store_score(N_level1, row1, column1);
    if (!kBounded && has_level2) {
      multiply_blocks(N_level2, is_N ? work + kLevel2 + row2 * kBlockBytes : work + kQuery2 + diagonal * kBlockBytes,
                      is_N ? kHalfBytes : kHalfBytes / 2, work + kLevel2 + column2 * kBlockBytes, kHalfBytes, matrix);
      store_score(N_level2, row2, column2);
    }
    cutlass::arch::fence_view_async_shared();
    math_sync();
    if (thread == 0) mbarrier_arrive(barriers.free_output());

    // Kd and Kr.
#pragma unroll 1
    for (int b = 0; b < kBlocks; ++b) {
      float k[8], sums[8], f[8];
      uint32_t bits[4];
      read_block(k, shared + L::kKey, b);
      read_decays(sums, b);
#pragma unroll
      for (int i = 0; i < 8; ++i) f[i] = ex2(sums[i]);
      scaled(bits, k, f);
      stmatrix_x4_trans(work + mine + b * kBlockBytes, bits);
      factors(f, sums, 7, -1.f);
      scaled(bits, k, f);
      stmatrix_x4_trans(work + kTensorBytes + mine + b * kBlockBytes, bits);
    }
    mbarrier_wait(barriers.full_states(), parity);
    // Zeros in rows that are not the sequence's; bf16, which is what products take, where T is not.
    const auto clean = [&](uint32_t tensor, bool convert) {
      const int token = thread / 4;
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const uint32_t address =
            tensor + thread / 2 % 2 * kHalfBytes + token * 128 + ((uint32_t(thread % 2 * 4 + i) ^ (token % 8)) << 4);
        const uint4 loaded = load_shared<uint4>(address);
        const uint32_t in[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
        float x[8];
        unpack(x, in, T{});
        uint32_t out[4];
        pack_block(out, x);
        uint4 bits = convert ? make_uint4(out[0], out[1], out[2], out[3]) : loaded;
        if (token >= valid) bits = make_uint4(0, 0, 0, 0);
        store_shared(address, bits);
      }
    };
    if (valid < kTile) clean(shared + L::kValue, false);
    cutlass::arch::fence_view_async_shared();
    mbarrier_wait(barriers.inverse_ready(), parity);
    math_sync();

    // Kd S^T, and dS' Kr^T + dO^T P: rows are channels of V.
    float to_values[kElements], to_updates[kElements];
    cute::warpgroup_arrive();
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      wgmma_shared<Major::K, Major::K>(
          to_values,
          swizzled_128b(shared + L::kStates + s / 4 * (kStateBytes / 2) + warpgroup * kHalfBytes + s % 4 * 32),
          swizzled_128b(work + s / 4 * kHalfBytes + s % 4 * 32), s == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      wgmma_shared<Major::K, Major::K>(
          to_updates,
          swizzled_128b(shared + L::kStateGradients + s / 4 * (kStateBytes / 2) + warpgroup * kHalfBytes + s % 4 * 32),
          swizzled_128b(work + kTensorBytes + s / 4 * kHalfBytes + s % 4 * 32),
          s == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
    cute::warpgroup_commit_batch();

    // W, and U by forward substitution.
    uint32_t w_bits[16], u_bits[16];
    {
      uint32_t v_bits[16];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        ldmatrix_x4_trans(*reinterpret_cast<uint32_t (*)[4]>(v_bits + 4 * b),
                          shared + L::kValue + mine + b * kBlockBytes);
      }
      __syncwarp();  // U takes v's place
      cute::warpgroup_wait<1>();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        float v[8];
        unpack(v, v_bits + 4 * b, T{});
        times_tokens(to_values + 8 * b, L::kKeyFactor, b);
#pragma unroll
        for (int i = 0; i < 8; ++i) to_values[8 * b + i] = v[i] - to_values[8 * b + i];
        pack_block(*reinterpret_cast<uint32_t (*)[4]>(w_bits + 4 * b), to_values + 8 * b);
        times_tokens(to_values + 8 * b, this_beta, b);
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t x[4], inverse[4];
      ldmatrix_x4(inverse, block_of(shared + L::kSystem, b, b));
      pack_block(x, to_values + 8 * b);
      float* u = to_values + 8 * b;
      multiply_rows(u, x, inverse);
      uint32_t (&bits)[4] = *reinterpret_cast<uint32_t (*)[4]>(u_bits + 4 * b);
      pack_block(bits, u);
      stmatrix_x4_trans(shared + L::kValue + mine + b * kBlockBytes, bits);
#pragma unroll
      for (int later = b + 1; later < kBlocks; ++later) {
        uint32_t y[4];
        ldmatrix_x4(y, block_of(shared + L::kSystem, later, b));
        multiply_rows(to_values + 8 * later, bits, y);
        ldmatrix_x4(y, block_of(shared + L::kSystem, b, later));
        multiply_rows(to_values + 8 * later, bits, y);
      }
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) times_tokens(to_updates + 8 * b, L::kKeyFactor, b);
    mbarrier_wait(barriers.full_output(), parity);
    if (valid < kTile || std::is_same_v<T, __half>) {
      clean(shared + L::kOutputGradient, true);
      cutlass::arch::fence_view_async_shared();
      math_sync();
    }
    cute::warpgroup_arrive();
#pragma unroll
    for (int s = 0; s < kBlocks; ++s) {
      wgmma_shared<Major::MN, Major::MN>(
          to_updates, swizzled_128b(shared + L::kOutputGradient + warpgroup * kHalfBytes + s * kBlockBytes),
          swizzled_128b(shared + L::kScores + s * kBlockBytes), ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    math_sync();  // Kd and Kr have been read

    // Y by backward substitution.
    float products[16];  // Y * W, summed over this thread's channels
#pragma unroll
    for (int b = kBlocks - 1; b >= 0; --b) {
      uint32_t x[4], inverse[4];
      ldmatrix_x4_trans(inverse, block_of(shared + L::kSystem, b, b));
      pack_block(x, to_updates + 8 * b);
      float* y = to_updates + 8 * b;
      multiply_columns(y, x, inverse);
      uint32_t bits[4];
      pack_block(bits, y);
      stmatrix_x4_trans(work + mine + b * kBlockBytes, bits);
#pragma unroll
      for (int earlier = b - 1; earlier >= 0; --earlier) {
        uint32_t l[4];
        ldmatrix_x4_trans(l, block_of(shared + L::kSystem, b, earlier));
        multiply_columns(to_updates + 8 * earlier, bits, l);
        ldmatrix_x4_trans(l, block_of(shared + L::kSystem, earlier, b));
        multiply_columns(to_updates + 8 * earlier, bits, l);
      }
      float w[8];
      unpack(w, w_bits + 4 * b, __nv_bfloat16{});
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = i / 2 * 4 + i % 2;
        products[4 * b + i] = fmaf(y[n], w[n], y[n + 2] * w[n + 2]);
      }
      times_tokens(y, this_beta, b);
      pack_block(bits, y);
      stmatrix_x4_trans(work + kTensorBytes + mine + b * kBlockBytes, bits);
    }
    // The sum over this warp's channels: the 8 lanes that hold a token are left with a pair of tokens each.
    add_halves<8, 16>(products, lane);
    add_halves<4, 8>(products, lane);
    add_halves<2, 4>(products, lane);
    store_shared(shared + L::kSums + ((2 * 8 + warp) * kTile + row * 8 + pair) * 4,
                 make_float2(products[0], products[1]));
    cutlass::arch::fence_view_async_shared();
    math_sync();

    // dO S, dW S and U dS': rows are channels of K.
    float d_query[kElements], d_key[kElements], d_sum[kElements];
    cute::warpgroup_arrive();
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const cute::GmmaDescriptor state =
          swizzled_128b(shared + L::kStates + warpgroup * (kStateBytes / 2) + s * kBlockBytes);
      wgmma_shared<Major::MN, Major::K>(d_query, state,
                                        swizzled_128b(shared + L::kOutputGradient + s / 4 * kHalfBytes + s % 4 * 32),
                                        s == 0 ? ScaleOut::Zero : ScaleOut::One);
      wgmma_shared<Major::MN, Major::K>(d_key, state,
                                        swizzled_128b(work + kTensorBytes + s / 4 * kHalfBytes + s % 4 * 32),
                                        s == 0 ? ScaleOut::Zero : ScaleOut::One);
      wgmma_shared<Major::MN, Major::K>(
          d_sum, swizzled_128b(shared + L::kStateGradients + warpgroup * (kStateBytes / 2) + s * kBlockBytes),
          swizzled_128b(shared + L::kValue + s / 4 * kHalfBytes + s % 4 * 32), s == 0 ? ScaleOut::Zero : ScaleOut::One);
    }
    cute::warpgroup_commit_batch();

    // dN by the warps that have N, with what it adds to dbeta, and dP.
    const auto store_score_gradient = [&](float (&x)[8], const float (&N)[8], int i, int j, int beta_slot) {
      if (is_N) {
        float sums[2] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          sums[e / 2 % 2] = fmaf(-x[e], N[e], sums[e / 2 % 2]);
          x[e] *= -row_beta(i, e / 2 % 2);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 1);
          sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 2);
          if (lane % 4 == 0)
            store_shared(shared + L::kBetaSlots + (beta_slot * kTile + 16 * i + row + 8 * half) * 4, sums[half]);
        }
      }
      times_factors(x, row_factors, i, j);
      store_block(shared + (is_N ? L::kSystem : L::kScores), i, j, x);
    };
    {
      // Diagonal, level 1, level 2: N turns, so that it is the first each time round.
      const uint32_t rows = is_N ? work : shared + L::kOutputGradient, columns = shared + L::kValue;
#pragma unroll 1
      for (int level = 0; level < (has_level2 ? 3 : 2); ++level) {
        const int i = level == 0 ? diagonal : level == 1 ? row1 : row2;
        const int j = level == 0 ? diagonal : level == 1 ? column1 : column2;
        float x[8];
        multiply_blocks(x, rows + i * kBlockBytes, kHalfBytes, columns + j * kBlockBytes, kHalfBytes, matrix);
        if (level == 0) keep_lower(x);
        store_score_gradient(x, N_diagonal, i, j, level == 0 ? 0 : level == 1 ? 1 + column1 : 3);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          N_diagonal[e] = N_level1[e];
          N_level1[e] = N_level2[e];
        }
      }
    }
    // Rows of a tensor in shared memory to rows of an output; `from` names the elements' type there.
    const auto copy_out = [&](uint32_t tensor, void* to, auto from) {
      const int first = thread / 16, chunk = thread % 16, step = p.value_heads * kHeadDim * 16;
      uint32_t address = tensor + chunk / 8 * kHalfBytes + first * 128 + ((uint32_t(chunk % 8) ^ (first % 8)) << 4);
      T* out = static_cast<T*>(to) + ((first_row + first) * p.value_heads + value_head) * kHeadDim + chunk * 8;
#pragma unroll 1
      for (int token = first; token < valid; token += 16, address += kBlockBytes, out += step) {
        uint4 x = load_shared<uint4>(address);
        if constexpr (!std::is_same_v<decltype(from), T>) {
          const uint32_t bits[4] = {x.x, x.y, x.z, x.w};
          float f[8];
          unpack(f, bits, from);
          x = make_uint4(pack(f[0], f[1], T{}), pack(f[2], f[3], T{}), pack(f[4], f[5], T{}), pack(f[6], f[7], T{}));
        }
        *reinterpret_cast<uint4*>(out) = x;
      }
    };
    if (p.dv) copy_out(work + kTensorBytes, p.dv, __nv_bfloat16{});
    cute::warpgroup_wait<0>();
    mbarrier_wait(barriers.sums_ready(), parity);
    math_sync();
    if (thread == 0) mbarrier_arrive(barriers.free_states());

    // g waits in shared memory while registers are scarce.
    const uint32_t waiting = work + thread * 16;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      store_shared(waiting + b * 4096,
                   make_uint4(x_bits[4 * b], x_bits[4 * b + 1], x_bits[4 * b + 2], x_bits[4 * b + 3]));
    }

    // Adds the products of kCount blocks of columns with kCount of rows, all pairs or, where both are the same blocks,
    // those on and below the diagonal. `base` is the tile's block at the front of the arrays.
    float tail[2] = {};  // of dG's last row
    const auto add_pairs = [&](auto count, auto first_column, auto first_row, int base, int at) {
      constexpr int kCount = decltype(count)::value, kColumn = decltype(first_column)::value;
      constexpr int kRow = decltype(first_row)::value;
      constexpr bool kTriangle = kColumn == kRow;
      float x[8], sums[8], f[8];
      uint32_t columns[kCount][4];
      float down[kCount][8] = {};
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        read_block(x, shared + L::kKey, base + kColumn + c);
        read_decays(sums, base + kColumn + c);
        factors(f, sums, at, -1.f);
        scaled(columns[c], x, f);
      }
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
        const int row_block = base + kRow + r;
        uint32_t q_rows[4], k_rows[4], d[4];
        read_decays(sums, row_block);
        factors(f, sums, at, 1.f);
        read_block(x, shared + L::kQuery, row_block);
        scaled(q_rows, x, f);
        read_block(x, shared + L::kKey, row_block);
        scaled(k_rows, x, f);
        const int n0 = 8 * (kRow + r);
        // With dP for the gradient of q, with dN for that of k.
        const auto add_rows = [&](uint32_t square, const uint32_t (&rows)[4], float (&gradient)[kElements]) {
          float by[8] = {};
#pragma unroll
          for (int c = 0; c < (kTriangle ? r + 1 : kCount); ++c) {
            ldmatrix_x4(d, block_of(square, row_block, base + kColumn + c));
            multiply_rows(by, columns[c], d);
            ldmatrix_x4_trans(d, block_of(square, row_block, base + kColumn + c));
            multiply_columns(down[c], rows, d);
          }
          unpack(x, rows, __nv_bfloat16{});
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            gradient[n0 + i] = fmaf(f[i], by[i], gradient[n0 + i]);
            d_sum[n0 + i] = fmaf(x[i], by[i], d_sum[n0 + i]);
          }
        };
        add_rows(shared + L::kScores, q_rows, d_query);
        add_rows(shared + L::kSystem, k_rows, d_key);
      }
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        read_decays(sums, base + kColumn + c);
        factors(f, sums, at, -1.f);
        unpack(x, columns[c], __nv_bfloat16{});
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int n = 8 * (kColumn + c) + i;
          d_key[n] = fmaf(f[i], down[c][i], d_key[n]);
          d_sum[n] = fmaf(-x[i], down[c][i], d_sum[n]);
        }
      }
    };
    // Half by half. The arrays turn by a half each time round, so that it is their first.
    constexpr std::integral_constant<int, 0> zero{};
    constexpr std::integral_constant<int, 1> one{};
    constexpr std::integral_constant<int, 2> two{};
#pragma unroll 1
    for (int base = 0; base < kBlocks; base += 2) {
      // What comes through the states.
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        float k[8], q[8], sums[8], f[8];
        read_block(k, shared + L::kKey, base + b);
        read_block(q, shared + L::kQuery, base + b);
        read_decays(sums, base + b);
        factors(f, sums, 7, -1.f);
        times_tokens(f, L::kKeyFactor, base + b);
        float start[8], query_start[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) start[i] = query_start[i] = ex2(sums[i]);
        times_tokens(start, L::kKeyFactor, base + b);
        times_tokens(query_start, L::kQueryFactor, base + b);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int n = 8 * b + i;
          const float up = -start[i] * d_key[n], down = f[i] * d_sum[n];
          d_query[n] *= query_start[i];
          d_key[n] = up + down;
          tail[i / 2 % 2] = fmaf(k[i], down, tail[i / 2 % 2]);
          d_sum[n] = fmaf(q[i], d_query[n], k[i] * (up - down));
        }
      }
      if constexpr (kBounded) {
        add_pairs(two, zero, zero, base, 2 * base + 1);
      } else {
        add_pairs(one, zero, zero, base, 2 * base);
        add_pairs(one, one, one, base, 2 * base + 2);
        add_pairs(one, zero, one, base, 2 * base + 1);
      }
      turn(d_query);
      turn(d_key);
      turn(d_sum);
    }
    add_pairs(two, zero, two, 0, 3);

    // What normalisation takes: q . dq and k . dk of each token, summed over this warp's channels: the 8 lanes that
    // hold a token are left with one of 8 sums each.
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      float k[8], q[8], x[8];
      read_block(k, shared + L::kKey, b);
      read_block(q, shared + L::kQuery, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = i / 2 * 4 + i % 2;
        x[i] = fmaf(q[n], d_query[8 * b + n], q[n + 2] * d_query[8 * b + n + 2]);
        x[4 + i] = fmaf(k[n], d_key[8 * b + n], k[n + 2] * d_key[8 * b + n + 2]);
      }
      add_halves<4, 16>(x, lane);
      add_halves<2, 8>(x, lane);
      add_halves<1, 4>(x, lane);
      const int token = 16 * b + lane / 8 % 2 * 8 + pair + lane / 4 % 2;
      store_shared(shared + L::kSums + ((lane / 16 * 8 + warp) * kTile + token) * 4, x[0]);
    }

    // The gates' gradients.
    float rate_sum = 0.f;
    {
      float carry[2], bias_sum[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        tail[half] += __shfl_xor_sync(0xffffffffu, tail[half], 1);
        tail[half] += __shfl_xor_sync(0xffffffffu, tail[half], 2);
        const float state_sum = load_shared<float>(shared + L::kStateSums + (slot * kHeadDim + channel + 8 * half) * 4);
        const float decayed = load_shared<float>(references + 7 * 4 * kHeadDim + half * 32);
        carry[half] = fmaf(ex2(decayed), state_sum, tail[half]);
      }
      // The last block is the array's last, and moves to its front.
#pragma unroll 1
      for (int b = kBlocks - 1; b >= 0; --b) {
        const uint4 loaded = load_shared<uint4>(waiting + b * 4096);
        const uint32_t bits[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
        float x[8];
        unpack(x, bits, std::conditional_t<L::kWideGate, __half, T>{});
#pragma unroll
        for (int i = 6; i >= 0; i -= 2) {
          const int half = i / 2 % 2, n = 24 + i, token = 16 * b + i / 4 * 8 + pair;
          float sum = d_sum[n] + d_sum[n + 1];
          float other = __shfl_down_sync(0xffffffffu, sum, 1, 4);
          if (lane % 4 < 3) sum += other;
          other = __shfl_down_sync(0xffffffffu, sum, 2, 4);
          if (lane % 4 < 2) sum += other;
          other = __shfl_down_sync(0xffffffffu, sum, 1, 4);
          const float d1 = carry[half] + (lane % 4 < 3 ? other : 0.f) + d_sum[n + 1], d0 = carry[half] + sum;
          carry[half] = __shfl_sync(0xffffffffu, d0, 0, 4);
          float rate0 = 0.f, rate1 = 0.f;
          d_sum[n] = decay.backward(x[i] + bias[half], d0, rate0);
          d_sum[n + 1] = decay.backward(x[i + 1] + bias[half], d1, rate1);
          if (token < valid) {
            bias_sum[half] += d_sum[n];
            rate_sum += rate0;
          }
          if (token + 1 < valid) {
            bias_sum[half] += d_sum[n + 1];
            rate_sum += rate1;
          }
        }
        turn_back(d_sum);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        bias_sum[half] += __shfl_xor_sync(0xffffffffu, bias_sum[half], 1);
        bias_sum[half] += __shfl_xor_sync(0xffffffffu, bias_sum[half], 2);
      }
      if (p.d_dt_bias && lane % 4 == 0) {
        float* partial = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + arguments.layout.bias_partials) +
                         int64_t(image) * kHeadDim + channel;
        partial[0] = bias_sum[0];
        partial[8] = bias_sum[1];
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) rate_sum += __shfl_xor_sync(0xffffffffu, rate_sum, offset);
      if (lane == 0) store_shared(shared + L::kRateSums + warp * 4, rate_sum);
    }
    math_sync();

    if (thread < 3 * kTile) {
      const int which = thread / kTile, token = thread % kTile;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += load_shared<float>(shared + L::kSums + ((which * 8 + i) * kTile + token) * 4);
      if (which < 2) {
        float factor = load_shared<float>(shared + (which ? L::kKeyFactor : L::kQueryFactor) + token * 4);
        if (which == 0) factor = p.scale == 0.f ? 0.f : factor / p.scale;  // 0 / 0 where nothing of q is read
        store_shared(shared + L::kTotals + thread * 4, p.qk_l2norm ? sum * factor * factor : 0.f);
      } else if (p.dbeta && token < valid) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += load_shared<float>(shared + L::kBetaSlots + (i * kTile + token) * 4);
        const float beta = load_shared<float>(shared + this_beta + token * 4);
        sum *= p.beta_sigmoid ? beta * (1.f - beta / p.beta_factor) : p.beta_factor;
        store_element(p.dbeta, (first_row + token) * p.value_heads + value_head, sum, p.beta_dtype);
      }
    } else if (thread == 3 * kTile && p.dA_log) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += load_shared<float>(shared + L::kRateSums + i * 4);
      reinterpret_cast<float*>(static_cast<char*>(p.workspace) + arguments.layout.A_log_partials)[image] = sum;
    }
    math_sync();

    // Out: through shared memory where an element has 16 bits, else from registers, whose 8 channels fill a sector.
    const bool grouped = p.value_heads != p.heads;
    const auto store_wide = [&](float* to, float (&x)[kElements]) {
      const int64_t stride = int64_t(p.value_heads) * kHeadDim;
      float* out = to + first_row * stride + int64_t(value_head) * kHeadDim + channel;
#pragma unroll 1
      for (int b = kBlocks - 1; b >= 0; --b) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int token = 16 * b + i / 4 * 8 + pair + i % 2;
          if (token < valid) out[token * stride + i / 2 % 2 * 8] = x[24 + i];
        }
        turn_back(x);
      }
    };
    const auto store_narrow = [&](uint32_t tensor, const float (&x)[kElements]) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) bits[i] = pack(x[8 * b + 2 * i], x[8 * b + 2 * i + 1], T{});
        stmatrix_x4_trans(tensor + mine + b * kBlockBytes, bits);
      }
    };
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const uint32_t totals = shared + L::kTotals + which * 4 * kTile + pair * 4;
      const uint32_t units = shared + (which ? L::kKeyUnit : L::kQueryUnit) + pair * 4;
      float (&d)[kElements] = which ? d_key : d_query;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        float x[8];
        read_block(x, shared + (which ? L::kKey : L::kQuery), b);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float2 unit = token_pair(units, 2 * b + i / 4), total = token_pair(totals, 2 * b + i / 4);
          d[8 * b + i] = (i % 2 ? unit.y : unit.x) * fmaf(-(i % 2 ? total.y : total.x), x[i], d[8 * b + i]);
        }
      }
      if (!grouped) {
        store_narrow(work + (2 - which) * kTensorBytes, d);
      } else if (which ? p.dk != nullptr : p.dq != nullptr) {
        store_wide(reinterpret_cast<float*>(static_cast<char*>(p.workspace) +
                                            (which ? arguments.layout.dk : arguments.layout.dq)),
                   d);
      }
    }
    if constexpr (L::kWideGate) {
      if (p.dg) store_wide(static_cast<float*>(p.dg), d_sum);
    } else {
      store_narrow(work, d_sum);
    }
    cutlass::arch::fence_view_async_shared();
    math_sync();
    mbarrier_arrive(barriers.free_keys());
    // First what lies where g comes.
    if constexpr (L::kWideGate) {
      if (!grouped && p.dk) copy_out(work + kTensorBytes, p.dk, T{});
    } else {
      if (p.dg) copy_out(work, p.dg, T{});
    }
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barriers.free_gates());
    if constexpr (!L::kWideGate) {
      if (!grouped && p.dk) copy_out(work + kTensorBytes, p.dk, T{});
    }
    if (!grouped && p.dq) copy_out(work + 2 * kTensorBytes, p.dq, T{});
  }
}

template <typename T, typename G, bool kBounded>
__global__ void __launch_bounds__(kGradientThreads, 1)
    gradients_kernel(const __grid_constant__ GradientArguments arguments) {
  using L = GradientLayout<G>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* base = unaligned + ((1024 - (cute::cast_smem_ptr_to_uint(unaligned) & 1023)) & 1023);
  const uint32_t shared = cute::cast_smem_ptr_to_uint(base);
  const GradientBarriers barriers{shared + L::kBarriers};

  if (threadIdx.x == 0) {
    mbarrier_init(barriers.full_keys(), 1);
    mbarrier_init(barriers.full_gates(), 1 + 32);
    mbarrier_init(barriers.full_states(), 1);
    mbarrier_init(barriers.full_output(), 1);
    mbarrier_init(barriers.free_keys(), kMathThreads);
    mbarrier_init(barriers.free_gates(), kMathThreads / 32);
    mbarrier_init(barriers.free_states(), 1 + 32);
    mbarrier_init(barriers.free_output(), 1);
    mbarrier_init(barriers.system_ready(), kMathThreads);
    mbarrier_init(barriers.inverse_ready(), 64);
    mbarrier_init(barriers.sums_ready(), 32);
    cutlass::arch::fence_barrier_init();
  }
  // Blocks above the diagonal, and the sums of blocks that have none, stay zero.
  for (int i = threadIdx.x * 16; i < kHalfBytes; i += kGradientThreads * 16)
    store_shared(shared + L::kScores + i, make_uint4(0, 0, 0, 0));
  for (int i = threadIdx.x * 16; i < 4 * 4 * kTile; i += kGradientThreads * 16)
    store_shared(shared + L::kBetaSlots + i, make_uint4(0, 0, 0, 0));
  __syncthreads();

  const int warp = threadIdx.x / 32;
  if (warp < kMathThreads / 32) {
    cutlass::arch::warpgroup_reg_alloc<kMathRegisters>();
    differentiate<T, G, kBounded>(arguments, shared, barriers);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<kHelperRegisters>();
    const int role = warp - kMathThreads / 32;
    if (role < 2) {
      invert_blocks<G>(arguments, shared, barriers, role);
    } else if (role == 2) {
      sum_states<G>(arguments, shared, barriers);
    } else if (threadIdx.x % 32 == 0) {
      load_tiles<G>(arguments, shared, base, barriers);
    }
  }
}

// ---- host

template <typename T, typename G, bool kBounded>
cudaError_t launch_gradients(const ChunkKdaBwdParams& p, const Plan& plan, cudaStream_t stream) {
  constexpr int kBytes = GradientLayout<G>::kBytes;
  GradientArguments a;
  a.p = p;
  a.tiles_per_sequence = plan.tiles_per_sequence;
  a.order = plan.order;
  a.layout = plan.workspace;
  if (!chunk_kda::encode_tokens<T, G>(a, p, kTile) ||
      !chunk_kda::encode_tiles<T>(&a.d_o, p.d_o, p.batch, p.tokens, p.value_heads, p.d_o_stride, kTile)) {
    return cudaErrorInvalidValue;
  }
  Launch launch = {dim3(plan.gradient_grid), kGradientThreads, kBytes};
  launch.overlap = plan.order.early_blocks > 0;
  return flashkda::launch<gradients_kernel<T, G, kBounded>>(a, launch, stream);
}

}  // namespace flashkda::chunk_kda_bwd
