// What the decode kernels are built for, and how they split the work: plain host functions, tested without a GPU.
#pragma once

#include <cstdint>

#include "params.h"

namespace flashkda::recurrent_kda {

constexpr int kHeadDim = 128;  // K and V
constexpr int kWarps = 4;      // in a CTA that decodes one token
constexpr int kThreads = 32 * kWarps;
constexpr int kTokensWarps = 8;  // in one that decodes several
constexpr int kTokensThreads = 32 * kTokensWarps;

// A warp owns this many rows of V of one head, a CTA kWarps times as many. Large calls want 8, which spread the gates
// and norms that every warp computes for itself over more rows; where there are too few heads to fill the chip, smaller
// pieces reach more SMs. A row's arithmetic is the same in all of them, and so are its bits.
inline int rows_per_warp(int64_t sequences, int value_heads, int sm_count) {
  const auto ctas = [&](int rows) { return sequences * value_heads * (kHeadDim / (kWarps * rows)); };
  if (ctas(8) >= 2 * sm_count) return 8;
  if (2 * ctas(4) >= sm_count) return 4;
  return 2;
}

// Whether every sequence has one token and one row of the pool, which a kernel of its own serves.
inline bool is_one_token(const RecurrentKdaParams& p) {
  return p.tokens == 1 && p.slots == 0 && p.cu_seqlens.values == nullptr;
}

// Why the kernels cannot take these params, or null. Alignment: four consecutive elements are one load, and up to 16
// bytes of a state.
inline const char* unsupported(const RecurrentKdaParams& p) {
  const auto misaligned = [](const void* base, BatchedStrides stride, int bytes) {
    return reinterpret_cast<uintptr_t>(base) % (4 * bytes) != 0 || (stride.batch | stride.token | stride.head) % 4 != 0;
  };
  const int state_bytes = p.state_dtype == Dtype::kFloat32 ? 4 : 2;
  if (p.head_dim_k != kHeadDim || p.head_dim_v != kHeadDim) return "K and V must be 128";
  if (p.heads <= 0 || p.value_heads <= 0 || p.value_heads % p.heads != 0)
    return "value_heads must be a positive multiple of heads";
  if (p.sequences < 0 || p.tokens < 0 || p.pool_rows < 0 || p.slots < 0)
    return "sequences, tokens, pool_rows and slots must not be negative";
  if (p.sequences > INT32_MAX / 2 || p.value_heads > INT32_MAX / kHeadDim) return "too many sequences or value heads";
  if (p.tokens > INT32_MAX / 2) return "too many tokens";
  if (p.num_accepted_tokens.values != nullptr && p.slots == 0)
    return "num_accepted_tokens must be absent without slots";
  if (p.dtype != Dtype::kBFloat16 && p.dtype != Dtype::kFloat16) return "q, k and v must be bf16 or fp16";
  if (p.g_dtype != p.dtype && p.g_dtype != Dtype::kFloat32) return "g must have q's dtype or be fp32";
  if (p.beta_dtype != p.dtype && p.beta_dtype != Dtype::kFloat32) return "beta must have q's dtype or be fp32";
  if (p.state_dtype != Dtype::kFloat32 && p.state_dtype != Dtype::kBFloat16) return "state_pool must be fp32 or bf16";
  if (misaligned(p.q, p.q_stride, 2) || misaligned(p.k, p.k_stride, 2)) return "q and k must be aligned to 8 bytes";
  if (misaligned(p.g, p.g_stride, p.g_dtype == Dtype::kFloat32 ? 4 : 2)) return "g must be aligned to 4 elements";
  if (reinterpret_cast<uintptr_t>(p.state_pool) % 16 != 0 || p.pool_stride * state_bytes % 16 != 0)
    return "state_pool must be aligned to 16 bytes";
  if (misaligned(p.dt_bias, {}, 4)) return "dt_bias must be aligned to 16 bytes";
  return nullptr;
}

}  // namespace flashkda::recurrent_kda
