// One decode step of Kimi Delta Attention: 128 KiB of state traffic a (sequence, value head), with arithmetic on it.
//
//   S <- S diag(alpha);   u = beta (v - S k);   S <- S + u k^T;   o = scale S q
//
// A lane holds 4 neighbouring channels of K, so a warp's 16-byte loads cover whole rows of the state. The rows of V are
// independent of each other: a warp owns kRows of them, keeps them in registers, and shares nothing with other warps.
// Every warp computes the norms and gates of its head for itself, in the time its rows take to arrive.
//
// Both dot products come from the decayed state, S q after the update being (S q before it) + u (q . k), so that one
// reduction serves both.
//
// A row's bits depend on its own sequence and head alone, not on the batch or on how rows are split: each lane sums its
// channels in one order, lanes are summed in one tree (warp.cuh), and every product that might be contracted into an
// fma is written as one or as a rounded product.
#pragma once

#include <cuda_runtime.h>

#include "common/math.cuh"
#include "common/memory.cuh"
#include "common/warp.cuh"
#include "sm90/recurrent_kda/config.h"
#include "sm90/recurrent_kda/launch.h"

namespace flashkda::recurrent_kda {

__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
  return make_float4(__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y), __fmul_rn(a.z, b.z), __fmul_rn(a.w, b.w));
}

__device__ __forceinline__ float4 operator*(float a, float4 b) { return make_float4(a, a, a, a) * b; }

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <typename F>
__device__ __forceinline__ float4 map(float4 x, F f) {
  return make_float4(f(x.x), f(x.y), f(x.z), f(x.w));
}

__device__ __forceinline__ float4 fma(float a, float4 b, float4 c) {
  return make_float4(fmaf(a, b.x, c.x), fmaf(a, b.y, c.y), fmaf(a, b.z, c.z), fmaf(a, b.w, c.w));
}

__device__ __forceinline__ float dot(float4 a, float4 b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, __fmul_rn(a.x, b.x))));
}

__device__ __forceinline__ int64_t offset(Strides stride, int64_t sequence, int head) {
  return sequence * stride.sequence + head * stride.head;
}

__device__ __forceinline__ int64_t load_state_index(const RecurrentKdaParams& p, int64_t sequence) {
  const int64_t i = sequence * p.index_stride;
  return p.index_is_64bit ? __ldg(static_cast<const int64_t*>(p.state_indices) + i)
                          : __ldg(static_cast<const int32_t*>(p.state_indices) + i);
}

// g and beta are T or fp32, known at run time. Both halves of an fp32 are loaded, the second being the first again
// where the element is T: two predicated loads into one register would wait for each other.
template <typename T>
__device__ __forceinline__ uint4 load4(const void* base, int64_t i, bool is_fp32) {
  const char* const address = static_cast<const char*>(base) + i * (is_fp32 ? sizeof(float) : sizeof(T));
  const uint2 low = load_8_bytes(address), high = load_8_bytes(address + (is_fp32 ? 8 : 0));
  return make_uint4(low.x, low.y, high.x, high.y);
}

template <typename T>
__device__ __forceinline__ float4 unpack4(uint4 x, bool is_fp32) {
  const float4 as_fp32 =
      make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w));
  return is_fp32 ? as_fp32 : flashkda::unpack4<T>(make_uint2(x.x, x.y));
}

template <typename T>
__device__ __forceinline__ ushort2 load1(const void* base, int64_t i, bool is_fp32) {
  const char* const address = static_cast<const char*>(base) + i * (is_fp32 ? sizeof(float) : sizeof(T));
  return make_ushort2(load_2_bytes(address), load_2_bytes(address + (is_fp32 ? 2 : 0)));
}

template <typename T>
__device__ __forceinline__ float unpack1(ushort2 x, bool is_fp32) {
  return is_fp32 ? __uint_as_float(unsigned(x.y) << 16 | x.x) : to_float(from_bits<T>(x.x));
}

// alpha = exp(log decay), from the raw gates of four channels; a = exp(A_log).
__device__ __forceinline__ float4 decay(const RecurrentKdaParams& p, float4 g, float a, float4 bias) {
  if (p.gate == Gate::kPrecomputed) return map(g, [](float x) { return exp(x); });
  const float4 x = g + bias;
  if (p.gate == Gate::kBounded)
    return map(x, [&](float x) { return exp(__fmul_rn(p.lower_bound, sigmoid(__fmul_rn(a, x)))); });
  return map(x, [&](float x) { return exp(__fmul_rn(-a, softplus(x))); });
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads) recurrent_kda_kernel(const __grid_constant__ RecurrentKdaParams p) {
  constexpr int kCtasPerHead = kHeadDim / (kWarps * kRows);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t sequence = blockIdx.x / kCtasPerHead;
  const int value_head = blockIdx.y;
  const int head = unsigned(value_head) * unsigned(p.heads) / unsigned(p.value_heads);
  const int first_row = (blockIdx.x % kCtasPerHead * kWarps + warp) * kRows;
  const int channel = 4 * lane;

  // The reduction below leaves S k of row r in kLanesPerRow lanes of the lower half warp, S q in as many of the upper.
  constexpr int kLanesPerRow = 16 / kRows;
  const int row = lane % 16 / kLanesPerRow;

  // Loads, all before any arithmetic: the index, since the state waits for it; then what does not; then the state.
  const int64_t slot = load_state_index(p, sequence);
  const uint2 q_bits = load_8_bytes(static_cast<const T*>(p.q) + offset(p.q_stride, sequence, head) + channel);
  const uint2 k_bits = load_8_bytes(static_cast<const T*>(p.k) + offset(p.k_stride, sequence, head) + channel);
  const bool g_is_fp32 = p.g_dtype == Dtype::kFloat32;
  const uint4 g_bits = load4<T>(p.g, offset(p.g_stride, sequence, value_head) + channel, g_is_fp32);
  const uint16_t v_bits =
      load_2_bytes(static_cast<const T*>(p.v) + offset(p.v_stride, sequence, value_head) + first_row + row);
  const bool beta_is_fp32 = p.beta_dtype == Dtype::kFloat32;
  const ushort2 beta_bits = load1<T>(p.beta, offset(p.beta_stride, sequence, value_head), beta_is_fp32);
  const float A_log = p.A_log != nullptr ? load_float(p.A_log + value_head) : 0.f;
  uint4 bias_bits = make_uint4(0, 0, 0, 0);
  if (p.dt_bias != nullptr) bias_bits = load_16_bytes(p.dt_bias + value_head * kHeadDim + channel);

  // Padding runs the same code on a state of zeros: a branch here would let the loads above sink below it.
  const bool is_padding = slot < 0 || slot >= p.pool_rows;
  float4* const state = reinterpret_cast<float4*>(p.state_pool + slot * p.pool_stride +
                                                  (int64_t(value_head) * kHeadDim + first_row) * kHeadDim + channel);
  constexpr int kRowStride = kHeadDim / 4;
  float4 S[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    S[r] = is_padding ? make_float4(0.f, 0.f, 0.f, 0.f) : load_streaming(state + r * kRowStride);
  }

  // While the state is on its way: gates, norms, q . k. The gates come first because they branch: shuffles that wait
  // for q and k would be scheduled above the state's loads, but not across a branch.
  const float4 alpha = decay(p, unpack4<T>(g_bits, g_is_fp32), exp(A_log), unpack4<T>(bias_bits, true));
  float beta = unpack1<T>(beta_bits, beta_is_fp32);
  if (p.beta_sigmoid) beta = __fmul_rn(p.beta_factor, sigmoid(beta));

  float4 q = flashkda::unpack4<T>(q_bits);
  float4 k = flashkda::unpack4<T>(k_bits);
  const float3 sums = warp_sum(make_float3(dot(q, q), dot(k, k), dot(q, k)));
  const float q_factor = p.qk_l2norm ? __fmul_rn(p.scale, rsqrt(sums.x + 1e-6f)) : p.scale;
  const float k_factor = p.qk_l2norm ? rsqrt(sums.y + 1e-6f) : 1.f;
  const float qk = __fmul_rn(__fmul_rn(q_factor, k_factor), sums.z);
  q = q_factor * q;
  k = k_factor * k;

  float dots[2 * kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    S[r] = S[r] * alpha;
    dots[r] = dot(S[r], k);
    dots[kRows + r] = dot(S[r], q);
  }
  const float Sk_or_Sq = warp_sums(dots, lane);
  const float u = __fmul_rn(beta, to_float(from_bits<T>(v_bits)) - Sk_or_Sq);  // in the lower half warp

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    S[r] = fma(__shfl_sync(kFullWarp, u, r * kLanesPerRow), k, S[r]);
    if (!is_padding) store_streaming(state + r * kRowStride, S[r]);
  }
  const float u_of_row = __shfl_sync(kFullWarp, u, lane % 16);
  if (lane >= 16 && lane % kLanesPerRow == 0) {
    T* const o = static_cast<T*>(p.o) + offset(p.o_stride, sequence, value_head) + first_row;
    o[row] = from_float<T>(is_padding ? 0.f : fmaf(u_of_row, qk, Sk_or_Sq));
  }
}

template <typename T, int kRows>
cudaError_t launch_rows(const RecurrentKdaParams& params, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(params.sequences * (kHeadDim / (kWarps * kRows))), unsigned(params.value_heads));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  // Returns this launch's own error, where cudaGetLastError would also return an earlier one of someone else's.
  return cudaLaunchKernelEx(&config, recurrent_kda_kernel<T, kRows>, params);
}

template <typename T>
cudaError_t launch(const RecurrentKdaParams& params, int rows_per_warp, cudaStream_t stream) {
  switch (rows_per_warp) {
    case 2: return launch_rows<T, 2>(params, stream);
    case 4: return launch_rows<T, 4>(params, stream);
    case 8: return launch_rows<T, 8>(params, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace flashkda::recurrent_kda
