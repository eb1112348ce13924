// Loads and stores by width. Volatile, so that the compiler keeps the order in which the source wants loads to leave:
// in a kernel bound by memory that order is the design.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace flashkda {

// Has the compiler hold an address instead of working it out again for each access.
template <typename T>
__device__ __forceinline__ void keep(T*& address) {
  asm volatile("" : "+l"(address));
}

// Data that is used once a launch and need not displace anything from L2: 1, 2, 4 or 8 words, aligned to their size
// (8 to 16 bytes).
template <int kWords>
__device__ __forceinline__ void load_streaming(const void* address, uint32_t (&x)[kWords]) {
  if constexpr (kWords == 1) {
    asm volatile("ld.global.cs.b32 %0, [%1];" : "=r"(x[0]) : "l"(address) : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("ld.global.cs.v2.b32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(address) : "memory");
  } else {
    static_assert(kWords % 4 == 0);
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      asm volatile("ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[i]), "=r"(x[i + 1]), "=r"(x[i + 2]), "=r"(x[i + 3])
                   : "l"(static_cast<const char*>(address) + 4 * i)
                   : "memory");
    }
  }
}

template <int kWords>
__device__ __forceinline__ void store_streaming(void* address, const uint32_t (&x)[kWords]) {
  if constexpr (kWords == 1) {
    asm volatile("st.global.cs.b32 [%0], %1;" ::"l"(address), "r"(x[0]) : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(x[0]), "r"(x[1]) : "memory");
  } else {
    static_assert(kWords % 4 == 0);
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(static_cast<char*>(address) + 4 * i), "r"(x[i]),
                   "r"(x[i + 1]), "r"(x[i + 2]), "r"(x[i + 3])
                   : "memory");
    }
  }
}

// Copies 16 bytes to shared memory, or zeroes them there, some time before wait_for_copies returns in this thread.
__device__ __forceinline__ void copy_16_bytes_async(void* shared, const void* global, bool is_zero) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(is_zero ? 0 : 16)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Read-only data that several warps want.
__device__ __forceinline__ uint4 load_16_bytes(const void* address) {
  uint4 x;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address));
  return x;
}

__device__ __forceinline__ uint2 load_8_bytes(const void* address) {
  uint2 x;
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(address));
  return x;
}

__device__ __forceinline__ float load_float(const float* address) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(address));
  return x;
}

__device__ __forceinline__ uint16_t load_2_bytes(const void* address) {
  uint16_t x;
  asm volatile("ld.global.nc.b16 %0, [%1];" : "=h"(x) : "l"(address));
  return x;
}

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float2 to_float2(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T>
struct Packed2;
template <>
struct Packed2<__half> {
  using type = __half2;
};
template <>
struct Packed2<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

template <typename T>
__device__ __forceinline__ T from_bits(uint16_t bits) {
  T x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

template <typename T>
__device__ __forceinline__ float4 unpack4(uint2 bits) {
  using T2 = typename Packed2<T>::type;
  T2 low, high;
  memcpy(&low, &bits.x, sizeof(low));
  memcpy(&high, &bits.y, sizeof(high));
  const float2 a = to_float2(low), b = to_float2(high);
  return make_float4(a.x, a.y, b.x, b.y);
}

}  // namespace flashkda
