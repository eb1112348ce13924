// Decode steps of Kimi Delta Attention: 128 KiB of state traffic a (sequence, value head) in fp32, with arithmetic on
// it (step.cuh).
//
// The rows of V are independent of each other: a warp owns kRows of them, keeps them in registers over all tokens, and
// needs nothing of the other warps' rows.
#pragma once

#include <cuda_runtime.h>

#include "common/indices.cuh"
#include "common/launch.h"
#include "common/memory.cuh"
#include "sm90/recurrent_kda/config.h"
#include "sm90/recurrent_kda/launch.h"
#include "sm90/recurrent_kda/state.cuh"
#include "sm90/recurrent_kda/step.cuh"

namespace flashkda::recurrent_kda {

__device__ __forceinline__ bool is_row(const RecurrentKdaParams& p, int64_t slot) {
  return slot >= 0 && slot < p.pool_rows;
}

// CTAs that run together work on neighbouring heads of a sequence, which lie next to each other in a row of the pool.
__device__ __forceinline__ int64_t sequence_of_cta() { return int64_t(blockIdx.z) * gridDim.y + blockIdx.y; }

// The kernel behind this one in the stream may start as soon as this one has no CTA left to start, if it waits as this
// one does here: for the kernel before it, whose results are there from now on.
__device__ __forceinline__ void overlap_launches() {
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
}

// One token and one slot a sequence. Every warp computes the norms and gates of its head for itself, in the time its
// rows take to arrive.
template <typename T, typename State, bool kVFirst, int kRows>
__global__ void __launch_bounds__(kThreads) one_token_kernel(const __grid_constant__ RecurrentKdaParams p) {
  using StateTile = Tile<State, kVFirst, kRows, kWarps>;
  constexpr int kCtaRows = kWarps * kRows;
  constexpr int kCtasPerHead = kHeadDim / kCtaRows;
  alignas(16) __shared__ char shared_tile[StateTile::kSharedBytes + 16];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t sequence = sequence_of_cta();
  if (sequence >= p.sequences) return;
  const int value_head = blockIdx.x / kCtasPerHead;
  const int head = unsigned(value_head) * unsigned(p.heads) / unsigned(p.value_heads);
  const int cta_row = blockIdx.x % kCtasPerHead * kCtaRows;
  const int row = cta_row + warp * kRows + Rows<kRows>::row(lane);
  const int channel = 4 * lane;
  const Token token = {sequence, 0, head, value_head};
  overlap_launches();

  // Loads, all before any arithmetic: the index, since the state waits for it; then what does not; then the state.
  const int64_t slot = load_index(p.state_indices, sequence * p.state_indices.stride);
  const TokenBits token_bits = load_token<T>(p, token, channel);
  const uint16_t v_bits = load_v<T>(p, token, row);
  const GateBits gate_bits = load_gate(p, value_head, channel);

  // Padding runs the same code on a state of zeros: a branch here would let the loads above sink below it.
  const bool is_padding = !is_row(p, slot);
  State* const state =
      static_cast<State*>(p.state_pool) + slot * p.pool_stride + StateTile::offset(value_head, cta_row);
  StateTile tile(warp, lane, shared_tile);
  tile.load(state, is_padding);

  // While the state is on its way: gates, norms, q . k.
  const Step step = prepare<T>(p, token_bits, gate_bits);
  float4 S[kRows];
  tile.wait(S);
  const float Sk_or_Sq = decay_and_multiply(S, step.alpha, step.q, step.k, lane);
  const float u = __fmul_rn(step.beta, to_float(from_bits<T>(v_bits)) - Sk_or_Sq);  // in the lower half warp
  update(S, u, step.k);
  if (!is_padding) tile.store(state, S);

  const float u_of_row = __shfl_sync(kFullWarp, u, lane % 16);
  if (Rows<kRows>::writes_o(lane)) {
    T* const o = static_cast<T*>(p.o) + token.offset(p.o_stride, value_head);
    o[row] = from_float<T>(is_padding ? 0.f : fmaf(u_of_row, step.qk, Sk_or_Sq));
  }
}

// Tokens whose factors are in shared memory at once: one for every warp to prepare.
constexpr int kTokensAtOnce = kTokensWarps;

template <int kCtaRows>
struct SharedStep {
  float4 alpha[32], q[32], k[32];
  float v[kCtaRows];
  int64_t slot;  // the row to write the state to after this token, or -1
  float beta, qk;
};

// The tokens of a sequence, and of all sequences, from an entry of cu_seqlens to another.
struct PackedTokens {
  int begin, end;   // of this sequence
  int first, last;  // of all
};

// cu_seqlens as every op reads it: within the tokens there are, and never decreasing, so that no token is two
// sequences'. An entry is the largest of those up to it, which the threads of a CTA find together. All of them call it,
// and agree even if someone writes cu_seqlens meanwhile.
template <typename Index>
__device__ __forceinline__ PackedTokens packed_tokens(const RecurrentKdaParams& p, int sequence) {
  __shared__ int2 warp_largest[kTokensWarps];
  __shared__ int first, next;
  const Index* const entries = static_cast<const Index*>(p.cu_seqlens.values);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, last = int(p.sequences);
  int upto = 0, all = 0;
#pragma unroll 4
  for (int i = thread; i <= last; i += kTokensThreads) {
    const Index given = __ldg(entries + i * p.cu_seqlens.stride);
    const int token = int(given < 0 ? 0 : given < p.tokens ? given : p.tokens);
    all = max(all, token);
    if (i <= sequence) upto = max(upto, token);
    if (i == 0) first = token;
    if (i == sequence + 1) next = token;
  }
  upto = __reduce_max_sync(kFullWarp, upto);
  all = __reduce_max_sync(kFullWarp, all);
  if (lane == 0) warp_largest[warp] = make_int2(upto, all);
  __syncthreads();
  const int2 largest = warp_largest[lane % kTokensWarps];
  upto = __reduce_max_sync(kFullWarp, largest.x);
  all = __reduce_max_sync(kFullWarp, largest.y);
  return {upto, max(upto, next), first, all};
}

// Zeros in a CTA's rows of o, for every step-th of `count` tokens.
template <typename T, int kCtaRows>
__device__ __forceinline__ void zero_o(const RecurrentKdaParams& p, Token first, int count, int step, int row) {
#pragma unroll 1
  for (int64_t i = int64_t(threadIdx.x / kCtaRows) * step; i < count; i += blockDim.x / kCtaRows * int64_t(step)) {
    T* const o = static_cast<T*>(p.o) + first.offset(p.o_stride, first.value_head) + i * p.o_stride.token;
    o[row + threadIdx.x % kCtaRows] = from_float<T>(0.f);
  }
}

// Any number of tokens, and a slot a sequence or one a token. The warps of a CTA share out the gates and norms of the
// tokens and meet at a barrier; from there on a token costs a warp only what its own rows need. Three CTAs on a
// multiprocessor are what the registers allow.
template <typename T, typename State, bool kVFirst, int kRows>
__global__ void __launch_bounds__(kTokensThreads, 3) tokens_kernel(const __grid_constant__ RecurrentKdaParams p) {
  using StateTile = Tile<State, kVFirst, kRows, kTokensWarps>;
  constexpr int kCtaRows = kTokensWarps * kRows;
  constexpr int kCtasPerHead = kHeadDim / kCtaRows;
  constexpr int kRowsOfLane = (kCtaRows + 31) / 32;
  __shared__ SharedStep<kCtaRows> steps[kTokensAtOnce];
  alignas(16) __shared__ char shared_tile[StateTile::kSharedBytes + 16];
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(kFullWarp, int(threadIdx.x) / 32, 0);  // so that the compiler sees it is uniform
  const int64_t sequence = sequence_of_cta();
  if (sequence >= p.sequences) return;
  const int value_head = blockIdx.x / kCtasPerHead;
  const int head = unsigned(value_head) * unsigned(p.heads) / unsigned(p.value_heads);
  const int cta_row = blockIdx.x % kCtasPerHead * kCtaRows;
  const int channel = 4 * lane;
  overlap_launches();

  // The row to start from is on its way beside cu_seqlens: the state waits for both.
  const auto slot_at = [&](int64_t column) {
    return load_index(p.state_indices, sequence * p.state_indices.stride + column * p.slot_stride);
  };
  int64_t column = 0;
  if (p.num_accepted_tokens.values != nullptr)
    column = load_index(p.num_accepted_tokens, sequence * p.num_accepted_tokens.stride) - 1;
  const bool is_column = p.slots == 0 || (column >= 0 && column < p.slots);
  const int64_t start = is_column ? slot_at(column) : -1;

  // This sequence's tokens, in bounds whatever cu_seqlens holds.
  Token first = {sequence, 0, head, value_head};
  int length = int(p.tokens);
  if (p.cu_seqlens.values != nullptr) {
    const PackedTokens packed =
        p.cu_seqlens.is_64bit ? packed_tokens<int64_t>(p, int(sequence)) : packed_tokens<int32_t>(p, int(sequence));
    first = {0, packed.begin, head, value_head};
    length = packed.end - packed.begin;
    // Tokens of no sequence, ahead of the first one and behind the last: each sequence zeroes some of them.
    const auto zero_outside = [&](int begin, int end) {
      const int mine = begin + int(sequence);
      zero_o<T, kCtaRows>(p, {0, mine, head, value_head}, end - mine, int(p.sequences), cta_row);
    };
    zero_outside(0, packed.first);
    zero_outside(packed.last, int(p.tokens));
    if (length <= 0) return;
  }
  if (!is_row(p, start)) {
    zero_o<T, kCtaRows>(p, first, length, 1, cta_row);
    return;
  }
  State* const states = static_cast<State*>(p.state_pool) + StateTile::offset(value_head, cta_row);
  StateTile tile(warp, lane, shared_tile);
  tile.load(states + start * p.pool_stride, false);

  const auto prepare_step = [&](int position) {
    SharedStep<kCtaRows>& shared = steps[warp];
    const Token token = {first.batch, first.token + position, head, value_head};
    const TokenBits token_bits = load_token<T>(p, token, channel);
    const GateBits gate_bits = load_gate(p, value_head, channel);
    uint16_t v_bits[kRowsOfLane];
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) v_bits[i] = load_v<T>(p, token, cta_row + (lane + 32 * i) % kCtaRows);
    const bool is_written = p.slots == 0 ? position == length - 1 : position < p.slots;
    const int64_t slot = is_written ? slot_at(p.slots == 0 ? 0 : position) : -1;
    const Step step = prepare<T>(p, token_bits, gate_bits);
    shared.alpha[lane] = step.alpha;
    shared.q[lane] = step.q;
    shared.k[lane] = step.k;
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) shared.v[(lane + 32 * i) % kCtaRows] = to_float(from_bits<T>(v_bits[i]));
    if (lane == 0) {
      shared.beta = step.beta;
      shared.qk = step.qk;
      shared.slot = is_row(p, slot) ? slot : -1;
    }
  };

  if (warp < length) prepare_step(warp);
  __syncthreads();
  float4 S[kRows];
  tile.wait(S);
  const int row = warp * kRows + Rows<kRows>::row(lane);
  T* o = static_cast<T*>(p.o) + first.offset(p.o_stride, value_head) + cta_row + row;
#pragma unroll 1
  for (int done = 0;;) {
    const int count = min(length - done, kTokensAtOnce);
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const SharedStep<kCtaRows>& step = steps[j];
      const float4 k = step.k[lane];
      const float Sk_or_Sq = decay_and_multiply(S, step.alpha[lane], step.q[lane], k, lane);
      const float u = __fmul_rn(step.beta, step.v[row] - Sk_or_Sq);  // in the lower half warp
      update(S, u, k);
      if (p.slots > 0) round_to<State>(S);  // so that decoding goes on from an accepted token's state as this does
      if (uint64_t(step.slot) < uint64_t(p.pool_rows)) tile.store(states + step.slot * p.pool_stride, S);
      const float u_of_row = __shfl_sync(kFullWarp, u, lane % 16);
      if (Rows<kRows>::writes_o(lane)) *o = from_float<T>(fmaf(u_of_row, step.qk, Sk_or_Sq));
      o += p.o_stride.token;
    }
    done += kTokensAtOnce;
    if (done >= length) return;
    __syncthreads();  // steps are read no more
    if (done + warp < length) prepare_step(done + warp);
    __syncthreads();
  }
}

template <typename T, typename State, bool kVFirst, int kRows>
cudaError_t launch_rows(const RecurrentKdaParams& params, cudaStream_t stream) {
  const bool one_token = is_one_token(params);
  const int warps = one_token ? kWarps : kTokensWarps;
  constexpr int64_t kMaxGridY = 65535;
  const int64_t y = params.sequences < kMaxGridY ? params.sequences : kMaxGridY;
  const int64_t z = (params.sequences + y - 1) / y;
  Launch launch = {dim3(unsigned(params.value_heads * (kHeadDim / (warps * kRows))), unsigned(y), unsigned(z)),
                   32 * warps};
  launch.overlap = true;
  const LaunchConfig configured(launch, stream);
  const auto kernel = one_token ? one_token_kernel<T, State, kVFirst, kRows> : tokens_kernel<T, State, kVFirst, kRows>;
  // Returns this launch's own error, where cudaGetLastError would also return an earlier one of someone else's.
  return cudaLaunchKernelEx(&configured.config, kernel, params);
}

template <typename T, typename State, bool kVFirst>
cudaError_t launch_layout(const RecurrentKdaParams& params, int rows_per_warp, cudaStream_t stream) {
  switch (rows_per_warp) {
    case 2: return launch_rows<T, State, kVFirst, 2>(params, stream);
    case 4: return launch_rows<T, State, kVFirst, 4>(params, stream);
    case 8: return launch_rows<T, State, kVFirst, 8>(params, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T, typename State>
cudaError_t launch(const RecurrentKdaParams& params, int rows_per_warp, cudaStream_t stream) {
  return params.state_v_first ? launch_layout<T, State, true>(params, rows_per_warp, stream)
                              : launch_layout<T, State, false>(params, rows_per_warp, stream);
}

}  // namespace flashkda::recurrent_kda
