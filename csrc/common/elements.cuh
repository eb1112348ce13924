// Elements of 16 and 32 bits, whose type is an argument or known at run time alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/hopper.cuh"
#include "params.h"

namespace flashkda {

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

// Eight elements of four registers; the last argument names their type.
__device__ __forceinline__ void unpack(float (&x)[8], const uint32_t* bits, __nv_bfloat16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(bits[i] << 16);
    x[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ float2 unpack_fp16(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof(bits));
  return __half22float2(pair);
}

__device__ __forceinline__ void unpack(float (&x)[8], const uint32_t* bits, __half) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack_fp16(bits[i]);
    x[2 * i] = f.x;
    x[2 * i + 1] = f.y;
  }
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// sum + x^2
__device__ __forceinline__ uint32_t add_square_bf16(uint32_t x, uint32_t sum) {
  asm("fma.rn.bf16x2 %0, %1, %1, %0;" : "+r"(sum) : "r"(x));
  return sum;
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

__device__ __forceinline__ float load_element(const void* base, int64_t index, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(base)[index];
  if (dtype == Dtype::kFloat16) return __half2float(static_cast<const __half*>(base)[index]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[index]);
}

__device__ __forceinline__ void store_element(void* base, int64_t index, float x, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(base)[index] = x;
  } else if (dtype == Dtype::kFloat16) {
    static_cast<__half*>(base)[index] = __float2half_rn(x);
  } else {
    static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(x);
  }
}

}  // namespace flashkda
