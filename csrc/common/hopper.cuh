// CuTe's and CUTLASS's Hopper instructions on what the kernels hold: 32-bit shared-memory addresses and arrays of
// registers. Instructions on neither are called by CuTe's own names.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/memory.h>

#include <cstdint>
#include <cstring>
#include <cuda/atomic>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/util.hpp>

namespace flashkda {

// CuTe takes pointers, and turns them back into addresses: both conversions fold away.
template <typename T = void>
__device__ __forceinline__ T* shared_pointer(uint32_t address) {
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

// ---- mbarriers

// CUTLASS's barriers do not keep the compiler from moving ordinary accesses across them; these do.
__device__ __forceinline__ void compiler_fence() { asm volatile("" ::: "memory"); }

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  cutlass::arch::ClusterBarrier::init(shared_pointer<uint64_t>(barrier), arrivals);
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  compiler_fence();
  cutlass::arch::ClusterBarrier::arrive(shared_pointer<uint64_t>(barrier));
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  compiler_fence();
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(shared_pointer<uint64_t>(barrier), bytes);
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!cutlass::arch::ClusterBarrier::try_wait(shared_pointer<uint64_t>(barrier), parity)) {
  }
  compiler_fence();
}

// For one thread that is far ahead of those it waits for: leaves them its issue slots.
__device__ __forceinline__ void mbarrier_wait_patiently(uint32_t barrier, uint32_t parity) {
  while (!cutlass::arch::ClusterBarrier::try_wait(shared_pointer<uint64_t>(barrier), parity)) __nanosleep(50);
  compiler_fence();
}

// ---- between blocks

// Between ordinary accesses of global memory and the copy engine's, on either side.
__device__ __forceinline__ void fence_global_async() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Two words at once, 8-byte aligned.
__device__ __forceinline__ int2 load_acquire_2(int* words) {
  auto& both = *reinterpret_cast<unsigned long long*>(words);
  const auto x = cuda::atomic_ref<unsigned long long, cuda::thread_scope_device>(both).load(cuda::memory_order_acquire);
  return make_int2(int(x), int(x >> 32));
}

__device__ __forceinline__ int load_acquire(int* word) {
  return cuda::atomic_ref<int, cuda::thread_scope_device>(*word).load(cuda::memory_order_acquire);
}

// Returns what it was.
__device__ __forceinline__ int add_release(int* word, int x) {
  return cuda::atomic_ref<int, cuda::thread_scope_device>(*word).fetch_add(x, cuda::memory_order_release);
}

__device__ __forceinline__ void store_release(int* word, int x) {
  cuda::atomic_ref<int, cuda::thread_scope_device>(*word).store(x, cuda::memory_order_release);
}

// The same in shared memory, of a block. Race detectors know that an exchange and a load that changes nothing are
// atomic, and take stores and loads for ordinary ones.
__device__ __forceinline__ void store_release_shared(uint32_t address, int x) {
  cuda::atomic_ref<int, cuda::thread_scope_block> word(*shared_pointer<int>(address));
  word.exchange(x, cuda::memory_order_release);
}

__device__ __forceinline__ int4 load_acquire_shared_4(uint32_t address) {
  int words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int& word = *shared_pointer<int>(address + 4 * i);
    words[i] = cuda::atomic_ref<int, cuda::thread_scope_block>(word).fetch_or(0, cuda::memory_order_acquire);
  }
  return make_int4(words[0], words[1], words[2], words[3]);
}

// ---- the copy engine

__device__ __forceinline__ void tma_load_4d(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int x0,
                                            int x1, int x2, int x3) {
  cute::SM90_TMA_LOAD_4D::copy(map, shared_pointer<uint64_t>(barrier), uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                               shared_pointer(destination), x0, x1, x2, x3);
}

// From shared memory, written by ordinary stores before a fence_view_async_shared, to global memory. The same thread
// waits, for all of its stores, before what they read is written again.
__device__ __forceinline__ void bulk_store(void* destination, uint32_t source, int bytes) {
  cute::SM90_BULK_COPY_S2G::copy(shared_pointer(source), destination, bytes);
  cute::tma_store_arrive();
}

__device__ __forceinline__ void bulk_store_wait() { cute::tma_store_wait<0>(); }

// The same, until what they write is there as well.
__device__ __forceinline__ void bulk_store_wait_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- shared memory, in the order of the source

template <typename T>
__device__ __forceinline__ T load_shared(uint32_t address) {
  T x;
  cutlass::arch::shared_load<sizeof(T)>(&x, address);
  return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 x) {
  cutlass::arch::shared_store<16>(address, &x);
}

// In PTX: CUTLASS stores integers only, and floats turned into those change how the transform's code is scheduled.
__device__ __forceinline__ void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float4 x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// ---- 8x8 matrices of 16-bit elements between shared memory and a warp's registers

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&x)[4], uint32_t address) {
  cute::SM75_U32x4_LDSM_N::copy(*shared_pointer<cute::uint128_t>(address), x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t address) {
  cute::SM75_U16x8_LDSM_T::copy(*shared_pointer<cute::uint128_t>(address), x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&x)[4]) {
  cute::SM90_U32x4_STSM_N::copy(x[0], x[1], x[2], x[3], *shared_pointer<cute::uint128_t>(address));
}

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, const uint32_t (&x)[4]) {
  cute::SM90_U16x8_STSM_T::copy(x[0], x[1], x[2], x[3], *shared_pointer<cute::uint128_t>(address));
}

// A matrix of 8 x 8 elements of 16 bits, of which each lane holds two neighbours in a row, transposed. CuTe has no word
// for it.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(x));
  return transposed;
}

// Has the compiler keep a value in its register instead of working it out again at each use.
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }

// ---- packing

// The first argument lands in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t x;
  memcpy(&x, &pair, sizeof(x));
  return x;
}

__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t x;
  memcpy(&x, &pair, sizeof(x));
  return x;
}

// ---- matrix products of a warp: D[16 x 8] = A[16 x 16] B[16 x 8] + C, fp32 accumulators

__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(d[0], d[1], d[2], d[3], a0, a1, a2, a3, b0, b1, d[0], d[1], d[2], d[3]);
}

__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const float (&c)[4]) {
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2],
                                          c[3]);
}

// ---- matrix products of a warpgroup: D[64 x N] (+)= A[64 x 16] B[16 x N], A in registers, B in shared memory, bf16

// Descriptors take an address in the block's own shared memory. In a cluster addresses say which block's, too.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address) { return address & 0xffffff; }

// B in the 128-byte swizzle, 8 rows every 1024 bytes: [N][K] or [K][N], of 64 elements a row.
__device__ __forceinline__ cute::GmmaDescriptor swizzled_128b(uint32_t address) {
  cute::GmmaDescriptor b;
  b.bitfield.layout_type_ = uint8_t(cute::SM90::GMMA::LayoutType::B128);
  b.bitfield.stride_byte_offset_ = 1024 >> 4;
  b.reg32_[0] = address >> 4;
  return b;
}

// B stored as [K / 8][N][8], not swizzled.
__device__ __forceinline__ cute::GmmaDescriptor k_major_plain(uint32_t address, uint32_t rows) {
  cute::GmmaDescriptor b;
  b.bitfield.layout_type_ = uint8_t(cute::SM90::GMMA::LayoutType::INTERLEAVE);
  b.bitfield.stride_byte_offset_ = 128 >> 4;
  b.reg32_[0] = address >> 4 | rows << 16;
  return b;
}

// The same memory with the other dimension contracted: [N / 8][K][8], `rows` of K.
__device__ __forceinline__ cute::GmmaDescriptor mn_major_plain(uint32_t address, uint32_t rows) {
  cute::GmmaDescriptor b;
  b.bitfield.layout_type_ = uint8_t(cute::SM90::GMMA::LayoutType::INTERLEAVE);
  b.bitfield.stride_byte_offset_ = rows;  // of 16 bytes
  b.reg32_[0] = address >> 4 | (128 >> 4) << 16;
  return b;
}

// The same B so many bytes on.
__device__ __forceinline__ cute::GmmaDescriptor moved(cute::GmmaDescriptor b, uint32_t bytes) {
  b.reg32_[0] += bytes / 16;
  return b;
}

// Major: of B. ScaleOut::Zero overwrites D.
template <cute::SM90::GMMA::Major kMajor>
__device__ __forceinline__ void wgmma(float (&d)[8], const uint32_t* a, cute::GmmaDescriptor b,
                                      cute::SM90::GMMA::ScaleOut scale = cute::SM90::GMMA::ScaleOut::One) {
  using Mma = cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, kMajor>;
  cute::detail::explode(Mma::fma, a, cute::make_int_sequence<4>{}, &b.desc_, cute::int_sequence<0>{}, d,
                        cute::make_int_sequence<8>{}, &scale, cute::int_sequence<0>{});
}

template <cute::SM90::GMMA::Major kMajor>
__device__ __forceinline__ void wgmma(float (&d)[16], const uint32_t* a, cute::GmmaDescriptor b,
                                      cute::SM90::GMMA::ScaleOut scale = cute::SM90::GMMA::ScaleOut::One) {
  using Mma = cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, kMajor>;
  cute::detail::explode(Mma::fma, a, cute::make_int_sequence<4>{}, &b.desc_, cute::int_sequence<0>{}, d,
                        cute::make_int_sequence<16>{}, &scale, cute::int_sequence<0>{});
}

template <cute::SM90::GMMA::Major kMajor>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t* a, cute::GmmaDescriptor b,
                                      cute::SM90::GMMA::ScaleOut scale = cute::SM90::GMMA::ScaleOut::One) {
  using Mma = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, kMajor>;
  cute::detail::explode(Mma::fma, a, cute::make_int_sequence<4>{}, &b.desc_, cute::int_sequence<0>{}, d,
                        cute::make_int_sequence<32>{}, &scale, cute::int_sequence<0>{});
}

// D[64 x 64] += A[64 x 16] B[16 x 64], fp16.
template <cute::SM90::GMMA::Major kMajor>
__device__ __forceinline__ void wgmma_fp16(float (&d)[32], const uint32_t* a, cute::GmmaDescriptor b) {
  using Mma = cute::SM90::GMMA::MMA_64x64x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, kMajor>;
  const auto scale = cute::SM90::GMMA::ScaleOut::One;
  cute::detail::explode(Mma::fma, a, cute::make_int_sequence<4>{}, &b.desc_, cute::int_sequence<0>{}, d,
                        cute::make_int_sequence<32>{}, &scale, cute::int_sequence<0>{});
}

// D[64 x 64] (+)= A[64 x 16] B[16 x 64], both in shared memory.
template <cute::SM90::GMMA::Major kMajorA, cute::SM90::GMMA::Major kMajorB>
__device__ __forceinline__ void wgmma_shared(float (&d)[32], cute::GmmaDescriptor a, cute::GmmaDescriptor b,
                                             cute::SM90::GMMA::ScaleOut scale) {
  using Mma = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<kMajorA, kMajorB>;
  cute::detail::explode(Mma::fma, &a.desc_, cute::int_sequence<0>{}, &b.desc_, cute::int_sequence<0>{}, d,
                        cute::make_int_sequence<32>{}, &scale, cute::int_sequence<0>{});
}

}  // namespace flashkda
