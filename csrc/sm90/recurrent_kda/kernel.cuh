// Decode steps of Kimi Delta Attention: 128 KiB of state traffic a (sequence, value head) in fp32, with arithmetic on
// it (step.cuh).
//
// A warp's loads cover whole rows of the state. The rows of V are independent of each other: a warp owns kRows of them,
// keeps them in registers over all tokens, and needs nothing of the other warps' rows.
#pragma once

#include <cuda_runtime.h>

#include "common/memory.cuh"
#include "sm90/recurrent_kda/config.h"
#include "sm90/recurrent_kda/launch.h"
#include "sm90/recurrent_kda/state.cuh"
#include "sm90/recurrent_kda/step.cuh"

namespace flashkda::recurrent_kda {

__device__ __forceinline__ int64_t load_index(Indices x, int64_t i) {
  return x.is_64bit ? __ldg(static_cast<const int64_t*>(x.values) + i)
                    : __ldg(static_cast<const int32_t*>(x.values) + i);
}

__device__ __forceinline__ bool is_row(const RecurrentKdaParams& p, int64_t slot) {
  return slot >= 0 && slot < p.pool_rows;
}

// One token and one slot a sequence. Every warp computes the norms and gates of its head for itself, in the time its
// rows take to arrive.
template <typename T, typename State, bool kVFirst, int kRows>
__global__ void __launch_bounds__(kThreads) one_token_kernel(const __grid_constant__ RecurrentKdaParams p) {
  constexpr int kCtasPerHead = kHeadDim / (kWarps * kRows);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t sequence = blockIdx.x / kCtasPerHead;
  const int value_head = blockIdx.y;
  const int head = unsigned(value_head) * unsigned(p.heads) / unsigned(p.value_heads);
  const int first_row = (blockIdx.x % kCtasPerHead * kWarps + warp) * kRows;
  const int row = first_row + Rows<kRows>::row(lane);
  const int channel = 4 * lane;
  const Token token = {sequence, 0, head, value_head};

  // Loads, all before any arithmetic: the index, since the state waits for it; then what does not; then the state.
  const int64_t slot = load_index(p.state_indices, sequence * p.state_indices.stride);
  const TokenBits token_bits = load_token<T>(p, token, channel, row);
  const GateBits gate_bits = load_gate(p, value_head, channel);

  // Padding runs the same code on a state of zeros: a branch here would let the loads above sink below it.
  using Bits = StateBits<State, kVFirst, kRows>;
  const bool is_padding = !is_row(p, slot);
  State* state =
      static_cast<State*>(p.state_pool) + slot * p.pool_stride + Bits::offset(value_head, first_row, channel);
  keep(state);
  Bits bits;
  bits.load(state, is_padding);

  // While the state is on its way: gates, norms, q . k.
  const Step step = prepare<T>(p, token_bits, gate_bits);
  float4 S[kRows];
  bits.unpack(S);
  const float Sk_or_Sq = decay_and_multiply(S, step.alpha, step.q, step.k, lane);
  const float u = __fmul_rn(step.beta, to_float(from_bits<T>(token_bits.v)) - Sk_or_Sq);  // in the lower half warp
  update(S, u, step.k);
  bits.pack(S);
  if (!is_padding) bits.store(state);

  const float u_of_row = __shfl_sync(kFullWarp, u, lane % 16);
  if (Rows<kRows>::writes_o(lane)) {
    T* const o = static_cast<T*>(p.o) + token.offset(p.o_stride, value_head);
    o[row] = from_float<T>(is_padding ? 0.f : fmaf(u_of_row, step.qk, Sk_or_Sq));
  }
}

// Tokens whose factors are in shared memory at once: two for every warp to prepare.
constexpr int kTokensAtOnce = 2 * kWarps;

template <int kCtaRows>
struct SharedStep {
  float4 alpha[32], q[32], k[32];
  float v[kCtaRows];
  int64_t slot;  // to write the state to after this token, if it is a row
  float beta, qk;
};

// Zeros in a CTA's rows of o, for every step-th of `count` tokens.
template <typename T, int kCtaRows>
__device__ __forceinline__ void zero_o(const RecurrentKdaParams& p, Token first, int count, int step, int row) {
#pragma unroll 1
  for (int64_t i = int64_t(threadIdx.x / kCtaRows) * step; i < count; i += kThreads / kCtaRows * int64_t(step)) {
    T* const o = static_cast<T*>(p.o) + first.offset(p.o_stride, first.value_head) + i * p.o_stride.token;
    o[row + threadIdx.x % kCtaRows] = from_float<T>(0.f);
  }
}

// Any number of tokens, and a slot a sequence or one a token. The warps of a CTA share out the gates and norms of the
// tokens and meet at a barrier; from there on a token costs a warp only what its own rows need. Six CTAs a
// multiprocessor is what the registers allow without a spill.
template <typename T, typename State, bool kVFirst, int kRows>
__global__ void __launch_bounds__(kThreads, 6) tokens_kernel(const __grid_constant__ RecurrentKdaParams p) {
  constexpr int kCtaRows = kWarps * kRows;
  constexpr int kCtasPerHead = kHeadDim / kCtaRows;
  __shared__ SharedStep<kCtaRows> steps[kTokensAtOnce];
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(kFullWarp, int(threadIdx.x) / 32, 0);  // so that the compiler sees it is uniform
  const int64_t sequence = blockIdx.x / kCtasPerHead;
  const int value_head = blockIdx.y;
  const int head = unsigned(value_head) * unsigned(p.heads) / unsigned(p.value_heads);
  const int cta_row = blockIdx.x % kCtasPerHead * kCtaRows;
  const int channel = 4 * lane;

  // This sequence's tokens, in bounds whatever cu_seqlens holds.
  Token first = {sequence, 0, head, value_head};
  int length = int(p.tokens);
  if (p.cu_seqlens.values != nullptr) {
    const auto bound = [&](int64_t i) {
      const int64_t token = load_index(p.cu_seqlens, i * p.cu_seqlens.stride);
      return int(token < 0 ? 0 : token < p.tokens ? token : p.tokens);
    };
    const int unused = bound(p.sequences) + int(sequence);  // every sequence zeroes some of the tokens behind the last
    first = {0, bound(sequence), head, value_head};
    length = bound(sequence + 1) - int(first.token);
    zero_o<T, kCtaRows>(p, {0, unused, head, value_head}, int(p.tokens - unused), int(p.sequences), cta_row);
    if (length <= 0) return;
  }

  const auto slot_at = [&](int64_t column) {
    return load_index(p.state_indices, sequence * p.state_indices.stride + column * p.slot_stride);
  };
  int64_t column = 0;
  if (p.num_accepted_tokens.values != nullptr)
    column = load_index(p.num_accepted_tokens, sequence * p.num_accepted_tokens.stride) - 1;
  const bool is_column = p.slots == 0 || (column >= 0 && column < p.slots);
  const int64_t start = is_column ? slot_at(column) : -1;
  if (!is_row(p, start)) {
    zero_o<T, kCtaRows>(p, first, length, 1, cta_row);
    return;
  }
  using Bits = StateBits<State, kVFirst, kRows>;
  State* const states = static_cast<State*>(p.state_pool) + Bits::offset(value_head, cta_row + warp * kRows, channel);
  Bits bits;
  bits.load(states + start * p.pool_stride, false);
  float4 S[kRows];
  bits.unpack(S);

#pragma unroll 1
  for (int done = 0; done < length; done += kTokensAtOnce) {
    const int count = min(length - done, kTokensAtOnce);
    if (done > 0) __syncthreads();  // steps are read no more
#pragma unroll 1
    for (int j = warp; j < count; j += kWarps) {
      SharedStep<kCtaRows>& shared = steps[j];
      const int position = done + j;
      const Token token = {first.batch, first.token + position, head, value_head};
      const TokenBits token_bits = load_token<T>(p, token, channel, cta_row + lane % kCtaRows);
      const GateBits gate_bits = load_gate(p, value_head, channel);
      const bool is_written = p.slots == 0 ? position == length - 1 : position < p.slots;
      const int64_t slot = is_written ? slot_at(p.slots == 0 ? 0 : position) : -1;
      const Step step = prepare<T>(p, token_bits, gate_bits);
      shared.alpha[lane] = step.alpha;
      shared.q[lane] = step.q;
      shared.k[lane] = step.k;
      if (lane < kCtaRows) shared.v[lane] = to_float(from_bits<T>(token_bits.v));
      if (lane == 0) {
        shared.beta = step.beta;
        shared.qk = step.qk;
        shared.slot = slot;
      }
    }
    __syncthreads();

#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const SharedStep<kCtaRows>& step = steps[j];
      const int row = warp * kRows + Rows<kRows>::row(lane);
      const float4 k = step.k[lane];
      const float Sk_or_Sq = decay_and_multiply(S, step.alpha[lane], step.q[lane], k, lane);
      const float u = __fmul_rn(step.beta, step.v[row] - Sk_or_Sq);  // in the lower half warp
      update(S, u, k);
      if (p.slots > 0 || is_row(p, step.slot)) {
        bits.pack(S);
        if (is_row(p, step.slot)) bits.store(states + step.slot * p.pool_stride);
        if (p.slots > 0) bits.unpack(S);  // a token later accepted finds what decoding token by token finds
      }
      const float u_of_row = __shfl_sync(kFullWarp, u, lane % 16);
      if (Rows<kRows>::writes_o(lane)) {
        const Token token = {first.batch, first.token + done + j, head, value_head};
        T* const o = static_cast<T*>(p.o) + token.offset(p.o_stride, value_head);
        o[cta_row + row] = from_float<T>(fmaf(u_of_row, step.qk, Sk_or_Sq));
      }
    }
  }
}

template <typename T, typename State, bool kVFirst, int kRows>
cudaError_t launch_rows(const RecurrentKdaParams& params, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(params.sequences * (kHeadDim / (kWarps * kRows))), unsigned(params.value_heads));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  const auto kernel =
      is_one_token(params) ? one_token_kernel<T, State, kVFirst, kRows> : tokens_kernel<T, State, kVFirst, kRows>;
  // Returns this launch's own error, where cudaGetLastError would also return an earlier one of someone else's.
  return cudaLaunchKernelEx(&config, kernel, params);
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
