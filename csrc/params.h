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
struct BatchedStrides {
  int64_t batch;
  int64_t token;
  int64_t head;
};

// int32 or int64, [n]: values[i * stride]; or absent, with a null `values`.
struct Indices {
  const void* values;
  int64_t stride;
  bool is_64bit;
};

// A few tokens a sequence. Every row of the batch is a sequence, or cu_seqlens cuts the only row of the batch into
// `sequences` of them; tokens behind the last one get an o of zero.
//
// The states of a sequence are rows of the pool. With slots = 0 one row, state_indices[sequence], is read before the
// first token and written after the last. With slots > 0 token t writes row state_indices[sequence][t], for t < slots,
// and the first one reads row state_indices[sequence][num_accepted_tokens[sequence] - 1], or [0] without those; between
// tokens a state has the values that are written. A row outside [0, pool_rows) is not written; a sequence whose first
// row it is, or whose accepted count is outside [1, slots], is padding: no state is touched, o is zero.
struct RecurrentKdaParams {
  const void* q;                // [batch, tokens, heads, K]         dtype
  const void* k;                // [batch, tokens, heads, K]         dtype
  const void* v;                // [batch, tokens, value_heads, V]   dtype
  const void* g;                // [batch, tokens, value_heads, K]   g_dtype: dtype or fp32
  const void* beta;             // [batch, tokens, value_heads]      beta_dtype: dtype or fp32
  void* o;                      // [batch, tokens, value_heads, V]   dtype
  void* state_pool;             // [pool_rows, value_heads, V, K] or [.., K, V], a row dense; state_dtype: fp32 or bf16
  const float* A_log;           // [value_heads], or null for a factor of 1
  const float* dt_bias;         // [value_heads, K], or null for 0
  Indices state_indices;        // [sequences], or [sequences, slots]
  Indices num_accepted_tokens;  // [sequences], or absent
  Indices cu_seqlens;           // [sequences + 1], or absent

  BatchedStrides q_stride, k_stride, v_stride, g_stride, beta_stride, o_stride;
  int64_t pool_stride;
  int64_t slot_stride;  // of state_indices, from token to token

  int64_t sequences;
  int64_t tokens;
  int64_t pool_rows;
  int64_t slots;
  int heads;
  int value_heads;
  int head_dim_k;
  int head_dim_v;

  Dtype dtype;
  Dtype g_dtype;
  Dtype beta_dtype;
  Dtype state_dtype;
  bool state_v_first;  // states are [V, K], else [K, V]

  Gate gate;
  float lower_bound;
  float scale;
  bool qk_l2norm;
  bool beta_sigmoid;
  float beta_factor;  // 2 where negative eigenvalues are allowed, else 1; applies after the sigmoid
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

// States that are rows of a pool, read and written in place. A sequence whose row is outside [0, rows) is padding: no
// state is touched, its o is zero. One without tokens leaves its row as it is.
struct StatePool {
  void* states;                   // [rows, value_heads, 128, 128] dtype, a row dense; or null for no pool
  Indices indices;                // [sequences]
  const bool* has_initial_state;  // [sequences], where a sequence that has none starts from zero; or null for all have
  int64_t rows;
  int64_t stride;  // from row to row
  Dtype dtype;     // fp32 or bf16; fp32 without a pool

  // The state after checkpoint_offsets[n][i] tokens of sequence n also goes to row checkpoint_indices[n][i]. An offset
  // outside [1, length] and a row outside the pool write nothing.
  int checkpoints;             // of each sequence
  Indices checkpoint_offsets;  // [sequences, checkpoints]
  Indices checkpoint_indices;  // [sequences, checkpoints]
};

struct ChunkKdaFwdParams : ChunkKdaParams {
  void* o;             // [batch, tokens, value_heads, 128]  dtype, dense
  float* final_state;  // as initial_state, or null
  StatePool pool;      // in place of initial_state and final_state
  bool one_segment;    // a sequence's bits depend on nothing but itself
};

// What each sequence does to its state: S' = S M + B where states are [V, K], M S + B where they are [K, V]. No q.
struct ChunkKdaTransitionParams : ChunkKdaParams {
  float* map;     // [sequences, value_heads, 128, 128]
  float* offset;  // as initial_state
};

// Gradients are dense, in the dtype of what they are of; a null one is not wanted.
struct ChunkKdaBwdParams : ChunkKdaParams {
  const void* d_o;             // [batch, tokens, value_heads, 128]  dtype
  const float* d_final_state;  // as initial_state, or null for 0
  void* dq;                    // [batch, tokens, heads, 128]
  void* dk;                    // [batch, tokens, heads, 128]
  void* dv;                    // [batch, tokens, value_heads, 128]
  void* dg;                    // [batch, tokens, value_heads, 128]
  void* dbeta;                 // [batch, tokens, value_heads]
  float* dA_log;               // [value_heads]
  float* d_dt_bias;            // [value_heads, 128]
  float* d_initial_state;      // as initial_state
  BatchedStrides d_o_stride;

  // Whether anything but d_initial_state is wanted, which alone needs no state of the forward pass.
  constexpr bool of_tokens() const { return dq || dk || dv || dg || dbeta || dA_log || d_dt_bias; }
};

}  // namespace flashkda
