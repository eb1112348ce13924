// fp32 functions from the special function unit, each good to a few ulp. tanh.approx, which would give a sigmoid in one
// instruction, is wrong by as much as a slow gate is large.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/functional.h>

namespace flashkda {

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two numbers, and NaN where one is, which fmaxf drops: a fault that reaches a gate must show in the
// result.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  return cutlass::maximum_with_nan_propagation<float>{}(a, b);
}

__device__ __forceinline__ float exp(float x) { return ex2(x * kLog2e); }

__device__ __forceinline__ float sigmoid(float x) { return rcp(1.f + exp(-x)); }

// log1pf, not lg2 of a sum: very negative x must keep its relative precision.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(exp(-fabsf(x))); }

// The same without a call: the special function unit's logarithm, and where 1 + e would lose the low bits of a small e,
// which are all there is of a slow gate, a series.
__device__ __forceinline__ float softplus_inline(float x) {
  const float e = ex2(-fabsf(x) * kLog2e);
  float log1p = lg2(1.f + e);
  log1p = e < 0.015625f ? fmaf(fmaf(e, 0.33333333f, -0.5f) * e, e, e) : log1p * 0.69314718f;
  return fmaxf(x, 0.f) + log1p;
}

}  // namespace flashkda
