// flashkda_ops._C: addresses, sizes, strides and a stream in, one launch out. Importing it makes no CUDA call.
//
// An op is one function here that fills the op's params, has them checked and launches; the two directions of the chunk
// form share an object of what both read. Tensors are described in flashkda_ops/cuda.py; validation for users happens
// before that, in the op itself.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>

#include "common/context.h"
#include "params.h"
#include "sm90/chunk_kda_bwd/launch.h"
#include "sm90/chunk_kda_fwd/launch.h"
#include "sm90/recurrent_kda/config.h"
#include "sm90/recurrent_kda/launch.h"
#include "tensor_reader.h"

namespace py = pybind11;

namespace flashkda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// The caller has made `device` current in its own CUDA runtime. This one, linked statically, follows the driver's
// current context, but may not have met it yet in this thread, and a thread of autograd may have none yet:
// cudaSetDevice makes the device's primary context current, without which the driver encodes no TMA descriptor. What
// was current stays so for the caller, since it may be a green context.
void use_device(int device) {
  thread_local bool met = false;
  const bool is_current = current_context_device() == device;
  if (met && is_current) return;
  const CUcontext context = is_current ? current_context() : nullptr;
  check(cudaSetDevice(device), "cudaSetDevice");
  if (context && !make_context_current(context))
    throw std::runtime_error("the caller's CUDA context cannot be current");
  met = true;
}

// Launches on a stream of a device, while other threads of Python run: a launch waits where the stream has no room for
// another one, and what makes room may be a thread's to do.
template <typename Launch>
void launch_on(int device, uintptr_t stream, const char* what, const Launch& launch) {
  const py::gil_scoped_release release;
  use_device(device);
  check(launch(reinterpret_cast<cudaStream_t>(stream)), what);
}

int sm_count(int device) {
  static std::array<std::atomic<int>, 64> counts{};
  const bool cached = device >= 0 && device < int(counts.size());
  if (cached && counts[device] > 0) return counts[device];
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (cached) counts[device] = count;
  return count;
}

template <typename T = const void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A tensor of a batch of sequences: its address, and its strides over the batch, tokens and heads.
using BatchedView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

void set(const void*& base, BatchedStrides& stride, const BatchedView& view) {
  base = pointer(std::get<0>(view));
  stride = {std::get<1>(view), std::get<2>(view), std::get<3>(view)};
}

// Indices: their address (0 where absent), their stride, and whether they are int64.
using IndexView = std::tuple<uintptr_t, int64_t, bool>;

Indices indices(const IndexView& view) { return {pointer(std::get<0>(view)), std::get<1>(view), std::get<2>(view)}; }

// rows_per_warp: 0 leaves the choice to config.h.
void recurrent_kda_paged(const BatchedView& o, const BatchedView& q, const BatchedView& k, const BatchedView& v,
                         const BatchedView& g, const BatchedView& beta, uintptr_t state_pool, int64_t pool_rows,
                         int64_t pool_stride, const IndexView& state_indices, int64_t slots, int64_t slot_stride,
                         const IndexView& num_accepted_tokens, const IndexView& cu_seqlens, uintptr_t A_log,
                         uintptr_t dt_bias, int64_t sequences, int64_t tokens, int heads, int value_heads,
                         int head_dim_k, int head_dim_v, Dtype dtype, Dtype g_dtype, Dtype beta_dtype,
                         Dtype state_dtype, bool state_v_first, Gate gate, float lower_bound, float scale,
                         bool qk_l2norm, bool beta_sigmoid, float beta_factor, int rows_per_warp, int device,
                         uintptr_t stream) {
  RecurrentKdaParams p = {};
  set(p.q, p.q_stride, q);
  set(p.k, p.k_stride, k);
  set(p.v, p.v_stride, v);
  set(p.g, p.g_stride, g);
  set(p.beta, p.beta_stride, beta);
  p.o = pointer<void>(std::get<0>(o));
  p.o_stride = {std::get<1>(o), std::get<2>(o), std::get<3>(o)};
  p.state_pool = pointer<void>(state_pool);
  p.pool_rows = pool_rows;
  p.pool_stride = pool_stride;
  p.state_indices = indices(state_indices);
  p.slots = slots;
  p.slot_stride = slot_stride;
  p.num_accepted_tokens = indices(num_accepted_tokens);
  p.cu_seqlens = indices(cu_seqlens);
  p.A_log = pointer<const float>(A_log);
  p.dt_bias = pointer<const float>(dt_bias);
  p.sequences = sequences;
  p.tokens = tokens;
  p.heads = heads;
  p.value_heads = value_heads;
  p.head_dim_k = head_dim_k;
  p.head_dim_v = head_dim_v;
  p.dtype = dtype;
  p.g_dtype = g_dtype;
  p.beta_dtype = beta_dtype;
  p.state_dtype = state_dtype;
  p.state_v_first = state_v_first;
  p.gate = gate;
  p.lower_bound = lower_bound;
  p.scale = scale;
  p.qk_l2norm = qk_l2norm;
  p.beta_sigmoid = beta_sigmoid;
  p.beta_factor = beta_factor;

  if (const char* reason = recurrent_kda::unsupported(p)) {
    throw std::invalid_argument(std::string("recurrent_kda_paged: ") + reason);
  }
  if (sequences == 0 || tokens == 0) return;
  launch_on(device, stream, "recurrent_kda_paged", [&](cudaStream_t on) {
    using namespace recurrent_kda;
    const int rows =
        rows_per_warp == 0 ? recurrent_kda::rows_per_warp(sequences, value_heads, sm_count(device)) : rows_per_warp;
    if (dtype == Dtype::kBFloat16) {
      return state_dtype == Dtype::kFloat32 ? launch<__nv_bfloat16, float>(p, rows, on)
                                            : launch<__nv_bfloat16, __nv_bfloat16>(p, rows, on);
    }
    return state_dtype == Dtype::kFloat32 ? launch<__half, float>(p, rows, on)
                                          : launch<__half, __nv_bfloat16>(p, rows, on);
  });
}

// Strides over the batch, tokens and heads.
using Strides = std::tuple<int64_t, int64_t, int64_t>;

BatchedStrides batched(const Strides& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }

// What calls of the same layout share: all but addresses.
ChunkKdaParams chunk_kda_params(const Strides& q, const Strides& k, const Strides& v, const Strides& g,
                                const Strides& beta, int batch, int64_t tokens, int heads, int value_heads,
                                int sequences, int sm_count, Dtype dtype, Dtype g_dtype, Dtype beta_dtype,
                                bool cu_seqlens_is_64bit, bool state_v_first, Gate gate, float lower_bound, float scale,
                                bool qk_l2norm, bool beta_sigmoid, float beta_factor) {
  ChunkKdaParams p = {};
  p.q_stride = batched(q);
  p.k_stride = batched(k);
  p.v_stride = batched(v);
  p.g_stride = batched(g);
  p.beta_stride = batched(beta);
  p.batch = batch;
  p.tokens = tokens;
  p.heads = heads;
  p.value_heads = value_heads;
  p.sequences = sequences;
  p.sm_count = sm_count;
  p.dtype = dtype;
  p.g_dtype = g_dtype;
  p.beta_dtype = beta_dtype;
  p.cu_seqlens_is_64bit = cu_seqlens_is_64bit;
  p.state_v_first = state_v_first;
  p.gate = gate;
  p.lower_bound = lower_bound;
  p.scale = scale;
  p.qk_l2norm = qk_l2norm;
  p.beta_sigmoid = beta_sigmoid;
  p.beta_factor = beta_factor;
  return p;
}

// Addresses of q, k, v, g, beta, A_log, dt_bias, initial_state and cu_seqlens, as TensorReader has them.
using Inputs = py::bytes;

void set_addresses(ChunkKdaParams& p, const Inputs& addresses, uintptr_t workspace) {
  std::array<uintptr_t, 9> inputs;
  const std::string_view bytes = addresses;
  if (bytes.size() != sizeof(inputs)) throw std::invalid_argument("inputs: expected nine addresses");
  std::memcpy(inputs.data(), bytes.data(), sizeof(inputs));
  p.q = pointer(inputs[0]);
  p.k = pointer(inputs[1]);
  p.v = pointer(inputs[2]);
  p.g = pointer(inputs[3]);
  p.beta = pointer(inputs[4]);
  p.A_log = pointer<const float>(inputs[5]);
  p.dt_bias = pointer<const float>(inputs[6]);
  p.initial_state = pointer<const float>(inputs[7]);
  p.cu_seqlens = pointer(inputs[8]);
  p.workspace = pointer<void>(workspace);
}

void chunk_kda_forward(const ChunkKdaParams& params, const Inputs& inputs, uintptr_t o, uintptr_t final_state,
                       bool one_segment, uintptr_t workspace, int device, uintptr_t stream) {
  ChunkKdaFwdParams p = {params};
  set_addresses(p, inputs, workspace);
  p.o = pointer<void>(o);
  p.final_state = pointer<float>(final_state);
  p.one_segment = one_segment;
  launch_on(device, stream, "chunk_kda_fwd", [&](cudaStream_t on) { return launch_chunk_kda_fwd(p, on); });
}

void chunk_kda_transition(const ChunkKdaParams& params, const Inputs& inputs, uintptr_t map, uintptr_t offset,
                          uintptr_t workspace, int device, uintptr_t stream) {
  ChunkKdaTransitionParams p = {params};
  set_addresses(p, inputs, workspace);
  p.map = pointer<float>(map);
  p.offset = pointer<float>(offset);
  launch_on(device, stream, "chunk_kda_transition",
            [&](cudaStream_t on) { return launch_chunk_kda_transition(p, on); });
}

// Without checkpoints their indices are absent.
void chunk_kda_paged(const ChunkKdaParams& params, const Inputs& inputs, uintptr_t o, uintptr_t state_pool,
                     Dtype state_dtype, int64_t pool_rows, int64_t pool_stride, const IndexView& state_indices,
                     uintptr_t has_initial_state, int checkpoints, const IndexView& checkpoint_offsets,
                     const IndexView& checkpoint_indices, bool one_segment, uintptr_t workspace, int device,
                     uintptr_t stream) {
  ChunkKdaFwdParams p = {params};
  set_addresses(p, inputs, workspace);
  p.o = pointer<void>(o);
  p.pool.states = pointer<void>(state_pool);
  p.pool.dtype = state_dtype;
  p.pool.rows = pool_rows;
  p.pool.stride = pool_stride;
  p.pool.indices = indices(state_indices);
  p.pool.has_initial_state = pointer<const bool>(has_initial_state);
  p.pool.checkpoints = checkpoints;
  p.pool.checkpoint_offsets = indices(checkpoint_offsets);
  p.pool.checkpoint_indices = indices(checkpoint_indices);
  p.one_segment = one_segment;
  launch_on(device, stream, "chunk_kda_paged", [&](cudaStream_t on) { return launch_chunk_kda_fwd(p, on); });
}

// grads: addresses of the gradients of q, k, v, g, beta, A_log, dt_bias and initial_state.
void chunk_kda_backward(const ChunkKdaParams& params, const Inputs& inputs, uintptr_t d_o, const Strides& d_o_stride,
                        uintptr_t d_final_state, const std::array<uintptr_t, 8>& grads, bool clusters,
                        uintptr_t workspace, int device, uintptr_t stream) {
  ChunkKdaBwdParams p = {params};
  set_addresses(p, inputs, workspace);
  p.d_o = pointer(d_o);
  p.d_o_stride = batched(d_o_stride);
  p.d_final_state = pointer<const float>(d_final_state);
  p.dq = pointer<void>(grads[0]);
  p.dk = pointer<void>(grads[1]);
  p.dv = pointer<void>(grads[2]);
  p.dg = pointer<void>(grads[3]);
  p.dbeta = pointer<void>(grads[4]);
  p.dA_log = pointer<float>(grads[5]);
  p.d_dt_bias = pointer<float>(grads[6]);
  p.d_initial_state = pointer<float>(grads[7]);
  launch_on(device, stream, "chunk_kda_bwd", [&](cudaStream_t on) { return launch_chunk_kda_bwd(p, clusters, on); });
}

std::string cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string cutlass_version() {
  return std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." + std::to_string(CUTLASS_PATCH);
}

}  // namespace
}  // namespace flashkda

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  using flashkda::Dtype;
  using flashkda::Gate;

  m.attr("cuda_archs") = FLASHKDA_CUDA_ARCHS;
  m.attr("cuda_version") = flashkda::cuda_version();
  m.attr("cutlass_version") = flashkda::cutlass_version();

  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::kFloat32)
      .value("float16", Dtype::kFloat16)
      .value("bfloat16", Dtype::kBFloat16);
  py::enum_<Gate>(m, "Gate")
      .value("precomputed", Gate::kPrecomputed)
      .value("bounded", Gate::kBounded)
      .value("unbounded", Gate::kUnbounded);

  py::class_<flashkda::TensorReader>(m, "TensorReader")
      .def(py::init<const py::capsule&, py::tuple>(), "exchange"_a, "types"_a)
      .def("__call__", &flashkda::TensorReader::operator(), "tensors"_a);
  m.def("recurrent_kda_rows_per_warp", &flashkda::recurrent_kda::rows_per_warp, "sequences"_a, "value_heads"_a,
        "sm_count"_a);
  m.def("recurrent_kda_paged", &flashkda::recurrent_kda_paged, "o"_a, "q"_a, "k"_a, "v"_a, "g"_a, "beta"_a,
        "state_pool"_a, "pool_rows"_a, "pool_stride"_a, "state_indices"_a, "slots"_a, "slot_stride"_a,
        "num_accepted_tokens"_a, "cu_seqlens"_a, "A_log"_a, "dt_bias"_a, "sequences"_a, "tokens"_a, "heads"_a,
        "value_heads"_a, "head_dim_k"_a, "head_dim_v"_a, "dtype"_a, "g_dtype"_a, "beta_dtype"_a, "state_dtype"_a,
        "state_v_first"_a, "gate"_a, "lower_bound"_a, "scale"_a, "qk_l2norm"_a, "beta_sigmoid"_a, "beta_factor"_a,
        "rows_per_warp"_a, "device"_a, "stream"_a);
  m.def("chunk_kda_fwd_workspace_bytes", &flashkda::chunk_kda_fwd_workspace_bytes, "sequences"_a, "value_heads"_a,
        "tokens"_a, "has_cu_seqlens"_a, "one_segment"_a, "sm_count"_a, "has_pool"_a, "checkpoints"_a);
  m.def("chunk_kda_transition_workspace_bytes", &flashkda::chunk_kda_transition_workspace_bytes, "sequences"_a,
        "has_cu_seqlens"_a);
  m.def("chunk_kda_bwd_workspace_bytes", &flashkda::chunk_kda_bwd_workspace_bytes, "batch"_a, "sequences"_a, "heads"_a,
        "value_heads"_a, "tokens"_a, "has_cu_seqlens"_a, "sm_count"_a);
  py::class_<flashkda::ChunkKdaParams>(m, "ChunkKdaParams")
      .def(py::init(&flashkda::chunk_kda_params), "q"_a, "k"_a, "v"_a, "g"_a, "beta"_a, "batch"_a, "tokens"_a,
           "heads"_a, "value_heads"_a, "sequences"_a, "sm_count"_a, "dtype"_a, "g_dtype"_a, "beta_dtype"_a,
           "cu_seqlens_is_64bit"_a, "state_v_first"_a, "gate"_a, "lower_bound"_a, "scale"_a, "qk_l2norm"_a,
           "beta_sigmoid"_a, "beta_factor"_a);
  m.def("chunk_kda_fwd", &flashkda::chunk_kda_forward, "params"_a, "inputs"_a, "o"_a, "final_state"_a, "one_segment"_a,
        "workspace"_a, "device"_a, "stream"_a);
  m.def("chunk_kda_transition", &flashkda::chunk_kda_transition, "params"_a, "inputs"_a, "map"_a, "offset"_a,
        "workspace"_a, "device"_a, "stream"_a);
  m.def("chunk_kda_paged", &flashkda::chunk_kda_paged, "params"_a, "inputs"_a, "o"_a, "state_pool"_a, "state_dtype"_a,
        "pool_rows"_a, "pool_stride"_a, "state_indices"_a, "has_initial_state"_a, "checkpoints"_a,
        "checkpoint_offsets"_a, "checkpoint_indices"_a, "one_segment"_a, "workspace"_a, "device"_a, "stream"_a);
  m.def("chunk_kda_bwd", &flashkda::chunk_kda_backward, "params"_a, "inputs"_a, "d_o"_a, "d_o_stride"_a,
        "d_final_state"_a, "grads"_a, "clusters"_a, "workspace"_a, "device"_a, "stream"_a);
}
