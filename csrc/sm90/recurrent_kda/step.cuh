// The arithmetic of one token, as both decode kernels do it: to the same bits.
//
//   S <- S diag(alpha);   u = beta (v - S k);   S <- S + u k^T;   o = scale S q
//
// A lane holds 4 neighbouring channels of K. Both dot products come from the decayed state, S q after the update being
// (S q before it) + u (q . k), so that one reduction serves both.
//
// A row's bits depend on its own sequence and head alone, not on the batch, on how rows are split or on which kernel
// runs: each lane sums its channels in one order, lanes are summed in one tree (warp.cuh), and every product that might
// be contracted into an fma is written as one or as a rounded product.
#pragma once

#include <cuda_runtime.h>

#include "common/math.cuh"
#include "common/memory.cuh"
#include "common/warp.cuh"
#include "sm90/recurrent_kda/config.h"

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

// ---- what a token brings

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

// Where a token of a value head lies, in elements.
struct Token {
  int64_t batch;
  int64_t token;
  int head;
  int value_head;

  __device__ __forceinline__ int64_t offset(BatchedStrides stride, int head) const {
    return batch * stride.batch + token * stride.token + head * stride.head;
  }
};

// A lane's four channels of a token, on their way from memory.
struct TokenBits {
  uint2 q, k;
  uint4 g;
  ushort2 beta;
};

template <typename T>
__device__ __forceinline__ TokenBits load_token(const RecurrentKdaParams& p, Token at, int channel) {
  TokenBits x;
  x.q = load_8_bytes(static_cast<const T*>(p.q) + at.offset(p.q_stride, at.head) + channel);
  x.k = load_8_bytes(static_cast<const T*>(p.k) + at.offset(p.k_stride, at.head) + channel);
  x.g = load4<T>(p.g, at.offset(p.g_stride, at.value_head) + channel, p.g_dtype == Dtype::kFloat32);
  x.beta = load1<T>(p.beta, at.offset(p.beta_stride, at.value_head), p.beta_dtype == Dtype::kFloat32);
  return x;
}

template <typename T>
__device__ __forceinline__ uint16_t load_v(const RecurrentKdaParams& p, Token at, int row) {
  return load_2_bytes(static_cast<const T*>(p.v) + at.offset(p.v_stride, at.value_head) + row);
}

// The gate's parameters, in the four channels of a lane, on their way from memory.
struct GateBits {
  float A_log;
  uint4 bias;
};

__device__ __forceinline__ GateBits load_gate(const RecurrentKdaParams& p, int value_head, int channel) {
  GateBits x = {0.f, make_uint4(0, 0, 0, 0)};
  if (p.A_log != nullptr) x.A_log = load_float(p.A_log + value_head);
  if (p.dt_bias != nullptr) x.bias = load_16_bytes(p.dt_bias + value_head * kHeadDim + channel);
  return x;
}

// ---- gates and norms

// alpha = exp(log decay), from the raw gates of four channels; a = exp(A_log).
__device__ __forceinline__ float4 decay(const RecurrentKdaParams& p, float4 g, float a, float4 bias) {
  if (p.gate == Gate::kPrecomputed) return map(g, [](float x) { return exp(x); });
  const float4 x = g + bias;
  if (p.gate == Gate::kBounded)
    return map(x, [&](float x) { return exp(__fmul_rn(p.lower_bound, sigmoid(__fmul_rn(a, x)))); });
  return map(x, [&](float x) { return exp(__fmul_rn(-a, softplus(x))); });
}

// The factors of one step, in four channels: q with its norm and scale, k with its norm.
struct Step {
  float4 alpha, q, k;
  float beta, qk;
};

// The gates come first because they branch: shuffles that wait for q and k would be scheduled above the loads of the
// state, but not across a branch.
template <typename T>
__device__ __forceinline__ Step prepare(const RecurrentKdaParams& p, const TokenBits& x, const GateBits& gate) {
  Step s;
  s.alpha = decay(p, unpack4<T>(x.g, p.g_dtype == Dtype::kFloat32), exp(gate.A_log), unpack4<T>(gate.bias, true));
  s.beta = unpack1<T>(x.beta, p.beta_dtype == Dtype::kFloat32);
  if (p.beta_sigmoid) s.beta = __fmul_rn(p.beta_factor, sigmoid(s.beta));

  const float4 q = flashkda::unpack4<T>(x.q);
  const float4 k = flashkda::unpack4<T>(x.k);
  const float3 sums = warp_sum(make_float3(dot(q, q), dot(k, k), dot(q, k)));
  const float q_factor = p.qk_l2norm ? __fmul_rn(p.scale, rsqrt(sums.x + 1e-6f)) : p.scale;
  const float k_factor = p.qk_l2norm ? rsqrt(sums.y + 1e-6f) : 1.f;
  s.qk = __fmul_rn(__fmul_rn(q_factor, k_factor), sums.z);
  s.q = q_factor * q;
  s.k = k_factor * k;
  return s;
}

// ---- the state

// In kLanesPerRow lanes of the lower half warp, row r's S k; in as many of the upper one, its S q.
template <int kRows>
struct Rows {
  static constexpr int kLanesPerRow = 16 / kRows;
  __device__ __forceinline__ static int row(int lane) { return lane % 16 / kLanesPerRow; }
  __device__ __forceinline__ static bool writes_o(int lane) { return lane >= 16 && lane % kLanesPerRow == 0; }
};

// Decays S and multiplies it with k and q: each in its half warp, as in Rows.
template <int kRows>
__device__ __forceinline__ float decay_and_multiply(float4 (&S)[kRows], float4 alpha, float4 q, float4 k, int lane) {
  float dots[2 * kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    S[r] = S[r] * alpha;
    dots[r] = dot(S[r], k);
    dots[kRows + r] = dot(S[r], q);
  }
  return warp_sums(dots, lane);
}

// S + u k^T; u is in the lower half warp.
template <int kRows>
__device__ __forceinline__ void update(float4 (&S)[kRows], float u, float4 k) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) S[r] = fma(__shfl_sync(kFullWarp, u, r * Rows<kRows>::kLanesPerRow), k, S[r]);
}

}  // namespace flashkda::recurrent_kda
