// What crosses from host to kernel: plain structs of addresses, sizes and strides. Nothing here knows of torch or
// Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashkda {

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };

// How the log decay comes from g:
//   kPrecomputed  g
//   kBounded      lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
//   kUnbounded    -exp(A_log) * softplus(g + dt_bias)
enum class Gate : int { kPrecomputed, kBounded, kUnbounded };

// Strides are in elements. A last dimension is contiguous, except where a stride is named for it.
struct Strides {
  int64_t sequence;
  int64_t head;
};

// One token a sequence. The state of (sequence, value head) is read and written in place, fp32 [V, K], in row
// state_indices[sequence] of the pool. A row outside [0, pool_rows) marks padding: no state is touched, o is zero.
struct RecurrentKdaParams {
  const void* q;              // [sequences, heads, K]         dtype
  const void* k;              // [sequences, heads, K]         dtype
  const void* v;              // [sequences, value_heads, V]   dtype
  const void* g;              // [sequences, value_heads, K]   g_dtype: dtype or fp32
  const void* beta;           // [sequences, value_heads]      beta_dtype: dtype or fp32
  void* o;                    // [sequences, value_heads, V]   dtype
  float* state_pool;          // [pool_rows, value_heads, V, K], a row dense
  const void* state_indices;  // [sequences]                   int32 or int64
  const float* A_log;         // [value_heads], or null for a factor of 1
  const float* dt_bias;       // [value_heads, K], or null for 0

  Strides q_stride, k_stride, v_stride, g_stride, beta_stride, o_stride;
  int64_t pool_stride;
  int64_t index_stride;

  int64_t sequences;
  int64_t pool_rows;
  int heads;
  int value_heads;
  int head_dim_k;
  int head_dim_v;

  Dtype dtype;
  Dtype g_dtype;
  Dtype beta_dtype;
  bool index_is_64bit;

  Gate gate;
  float lower_bound;
  float scale;
  bool qk_l2norm;
  bool beta_sigmoid;
  float beta_factor;  // 2 where negative eigenvalues are allowed, else 1; applies after the sigmoid
};

struct BatchedStrides {
  int64_t batch;
  int64_t token;
  int64_t head;
};

// What both directions of the chunk form read. Whole sequences: every row of the batch is one, or cu_seqlens cuts the
// only row of the batch into `sequences` of them.
struct ChunkKdaParams {
  const void* q;               // [batch, tokens, heads, 128]        dtype
  const void* k;               // [batch, tokens, heads, 128]        dtype
  const void* v;               // [batch, tokens, value_heads, 128]  dtype
  const void* g;               // [batch, tokens, value_heads, 128]  g_dtype: dtype or fp32
  const void* beta;            // [batch, tokens, value_heads]       beta_dtype: any
  const float* A_log;          // [value_heads], or null for a factor of 1
  const float* dt_bias;        // [value_heads, 128], or null for 0
  const float* initial_state;  // [sequences, value_heads, 128, 128], or null for 0
  const void* cu_seqlens;      // [sequences + 1] int32 or int64, or null
  void* workspace;             // as many bytes as the direction's plan says, 16-byte aligned; or null where those are 0

  BatchedStrides q_stride, k_stride, v_stride, g_stride, beta_stride;

  int batch;
  int64_t tokens;
  int heads;
  int value_heads;
  int sequences;
  int sm_count;

  Dtype dtype;
  Dtype g_dtype;
  Dtype beta_dtype;
  bool cu_seqlens_is_64bit;
  bool state_v_first;  // states are [V, K], else [K, V]

  Gate gate;
  float lower_bound;
  float scale;
  bool qk_l2norm;
  bool beta_sigmoid;
  float beta_factor;  // 2 where negative eigenvalues are allowed, else 1; applies after the sigmoid
};

struct ChunkKdaFwdParams : ChunkKdaParams {
  void* o;             // [batch, tokens, value_heads, 128]  dtype, dense
  float* final_state;  // as initial_state, or null
  bool one_segment;    // a sequence's bits depend on nothing but itself
};

// Gradients are dense, in the dtype of what they are of; a null one is not wanted.
struct ChunkKdaBwdParams : ChunkKdaParams {
  const void* d_o;               // [batch, tokens, value_heads, 128]  dtype
  const float* d_final_state;    // as initial_state, or null for 0
  void* dq;                      // [batch, tokens, heads, 128]
  void* dk;                      // [batch, tokens, heads, 128]
  void* dv;                      // [batch, tokens, value_heads, 128]
  void* dg;                      // [batch, tokens, value_heads, 128]
  void* dbeta;                   // [batch, tokens, value_heads]
  float* dA_log;                 // [value_heads]
  float* d_dt_bias;              // [value_heads, 128]
  float* d_initial_state;        // as initial_state
  BatchedStrides d_o_stride;
};

}  // namespace flashkda
