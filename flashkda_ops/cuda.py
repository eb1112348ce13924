"""Tensors to raw pointers: the only module that imports the extension, which it does at the first question about it.

The extension's functions are called by position, since matching forty keywords takes longer than the rest of a call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashkda_ops.options import KdaOptions

_View = tuple[int, int, int, int]
"""The address of a tensor [B, T, H] or [B, T, H, D], and its strides over the batch, tokens and heads."""


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        extension = importlib.import_module("flashkda_ops._C")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "flashkda_ops._C"
        return None, "this install was built without CUDA" if absent else f"flashkda_ops._C does not load: {error}"
    archs = extension.cuda_archs.replace(";", ", ")
    return extension, f"built for {archs} with CUDA {extension.cuda_version}, CUTLASS {extension.cutlass_version}"


def extension_status() -> tuple[bool, str]:
    """Whether the extension is loaded; what it was built with, or why it is not there."""
    extension, status = _load()
    return extension is not None, status


def _extension() -> Any:
    extension, status = _load()
    if extension is None:
        raise RuntimeError(f"flashkda_ops has no CUDA kernels: {status}")
    return extension


@functools.cache
def device_reason(device: torch.device) -> str | None:
    """Why this build has no kernels for the device, or None if it has."""
    extension, status = _load()
    if extension is None:
        return status
    if device.type != "cuda":
        return f"device {device}: the kernels run on CUDA devices"
    if torch.version.cuda is None:
        return "this torch was not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if f"{major}{minor}" in [arch.rstrip("af") for arch in extension.cuda_archs.split(";")]:
        return None
    return f"compute capability {major}.{minor}: the extension was {status}"


@functools.cache
def _dtypes() -> dict[torch.dtype, Any]:
    dtype = _extension().Dtype
    return {torch.float32: dtype.float32, torch.float16: dtype.float16, torch.bfloat16: dtype.bfloat16}


def _launch(function: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    """Calls a function of the extension, for the current stream of the device, which is current meanwhile."""
    index = device.index
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):  # takes microseconds: most calls need none
            return _launch(function, device, *arguments)
    function(*arguments, index, torch._C._cuda_getCurrentRawStream(index))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _sequences(batch: int, cu_seqlens: Tensor | None) -> int:
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _tokens_reason(q: Tensor, v: Tensor) -> str | None:
    """Why no kernel serves these (valid) tokens, or None if all do."""
    reason = device_reason(q.device)
    if reason is not None:
        return reason
    K, V = q.shape[3], v.shape[3]
    if K != 128 or V != 128:
        return f"K={K}, V={V}: the kernel has K=V=128"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q, k, v are {q.dtype}: the kernel takes bfloat16 or float16"
    return None


def _pool_reason(state_pool: Tensor) -> str | None:
    """Why no kernel takes this (valid) pool beside tokens that it serves."""
    if state_pool.stride()[2:] != (128, 1) or (state_pool.shape[1] > 1 and state_pool.stride(1) != 128 * 128):
        return f"state_pool has strides {state_pool.stride()}: the kernel takes dense rows"
    per_16_bytes = 16 // state_pool.element_size()
    if state_pool.stride(0) % per_16_bytes != 0 or state_pool.storage_offset() % per_16_bytes != 0:
        return "state_pool is not aligned to 16 bytes"
    return None


@functools.lru_cache(maxsize=1024)
def _option_arguments(options: KdaOptions) -> tuple[Any, ...]:
    """The options as all kernels take them: gate, lower_bound, scale, qk_l2norm, beta_sigmoid, beta_factor."""
    gate = _extension().Gate
    bounded = options.lower_bound is not None
    return (
        (gate.bounded if bounded else gate.unbounded) if options.use_gate_in_kernel else gate.precomputed,
        options.lower_bound if bounded else -1.0,  # not used, but divided by
        options.scale,
        options.use_qk_l2norm_in_kernel,
        options.use_beta_sigmoid_in_kernel,
        2.0 if options.allow_neg_eigval else 1.0,
    )


def recurrent_kda_paged_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
) -> str | None:
    """Why no decode kernel serves this (valid) call, or None if one does. Reads no tensor's values."""
    reason = _tokens_reason(q, v) or _pool_reason(state_pool)
    if reason is not None:
        return reason
    if q.shape[1] > (2**31 - 1) // 2:
        return f"T={q.shape[1]}: the kernel counts in 32 bits"
    return None


def _loadable_view(x: Tensor, elements: int = 4) -> tuple[Tensor, _View]:
    """x of [B, T, H, D], or a copy where D is not contiguous or not aligned to loads of that many elements."""
    address, (batch, token, head, last) = x.data_ptr(), x.stride()
    if last != 1 or (batch | token | head) % elements != 0 or address % (elements * x.element_size()) != 0:
        x = x.clone(memory_format=torch.contiguous_format)
        address, (batch, token, head, last) = x.data_ptr(), x.stride()
    return x, (address, batch, token, head)


def _indices(x: Tensor | None) -> tuple[int, int, bool]:
    """The address of x, its first stride and whether it is int64."""
    return (0, 0, False) if x is None else (x.data_ptr(), x.stride(0), x.dtype is torch.int64)


def recurrent_kda_paged(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    state_indices: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    options: KdaOptions,
    *,
    state_v_first: bool,
    rows_per_warp: int = 0,
) -> None:
    """Launches a decode kernel on the current stream; writes all of o and rows of state_pool.

    rows_per_warp (2, 4, 8) overrides how the work is split, which changes no bit of the result: for tests and tuning.
    """
    device, dtypes = q.device, _dtypes()
    # A copy is freed as this returns, in the order of the current stream, where the kernel runs.
    q, q_view = _loadable_view(q)
    k, k_view = _loadable_view(k)
    v, v_view = _loadable_view(v, elements=1)
    g, g_view = _loadable_view(g)
    A_log = None if A_log is None else _dense_float(A_log)
    dt_bias = None if dt_bias is None else _aligned(_dense_float(dt_bias))
    slots, slot_stride = 0, 0
    if state_indices.dim() == 2:
        slots, slot_stride = state_indices.shape[1], state_indices.stride(1)
    batch, tokens, heads, head_dim_k = q.shape
    value_heads, head_dim_v = v.shape[2:]
    _launch(
        _extension().recurrent_kda_paged,
        device,
        (o.data_ptr(), *o.stride()[:3]),
        q_view,
        k_view,
        v_view,
        g_view,
        (beta.data_ptr(), *beta.stride()),
        state_pool.data_ptr(),
        state_pool.shape[0],
        state_pool.stride(0),
        _indices(state_indices),
        slots,
        slot_stride,
        _indices(num_accepted_tokens),
        _indices(cu_seqlens),
        _address(A_log),
        _address(dt_bias),
        _sequences(batch, cu_seqlens),
        tokens,
        heads,
        value_heads,
        head_dim_k,
        head_dim_v,
        dtypes[q.dtype],
        dtypes[g.dtype],
        dtypes[beta.dtype],
        dtypes[state_pool.dtype],
        state_v_first,
        *_option_arguments(options),
        rows_per_warp,
    )


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=1024)
def _forward_workspace_bytes(
    sequences: int,
    value_heads: int,
    tokens: int,
    packed: bool,
    one_segment: bool,
    sm_count: int,
    has_pool: bool = False,
    checkpoints: int = 0,
) -> int:
    return _extension().chunk_kda_fwd_workspace_bytes(
        sequences, value_heads, tokens, packed, one_segment, sm_count, has_pool, checkpoints
    )


@functools.lru_cache(maxsize=1024)
def _transition_workspace_bytes(sequences: int, packed: bool) -> int:
    return _extension().chunk_kda_transition_workspace_bytes(sequences, packed)


@functools.lru_cache(maxsize=1024)
def _backward_workspace_bytes(
    batch: int, sequences: int, heads: int, value_heads: int, tokens: int, packed: bool, sm_count: int
) -> int:
    return _extension().chunk_kda_bwd_workspace_bytes(batch, sequences, heads, value_heads, tokens, packed, sm_count)


def _tma_view(x: Tensor) -> tuple[Tensor, _View]:
    """x of [B, T, H, D], or a copy where a TMA descriptor cannot describe it."""
    address, (batch, token, head, last) = x.data_ptr(), x.stride()
    per_16_bytes = 16 // x.element_size()
    # A stride over a single index is never taken, and may be anything; one of 0 over several is an expanded tensor's.
    if last != 1 or address % 16 != 0 or (batch | token | head) % per_16_bytes != 0 or not (batch and token and head):
        sizes = x.shape
        taken = [step for step, size in zip((batch, token, head), sizes, strict=False) if size > 1]
        if last != 1 or address % 16 != 0 or any(step % per_16_bytes != 0 or step == 0 for step in taken):
            x = x.clone(memory_format=torch.contiguous_format)
            address, (batch, token, head, last) = x.data_ptr(), x.stride()
    return x, (address, batch, token, head)


def _dense_float(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def chunk_kda_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> str | None:
    """Why the chunk kernels do not serve this (valid) call in either direction, or None if they do.

    Reads no tensor's values.
    """
    reason = _tokens_reason(q, v)
    if reason is not None:
        return reason
    if initial_state is not None and initial_state.dtype != torch.float32:
        return f"initial_state is {initial_state.dtype}: the kernel takes float32"
    batch, tokens, value_heads = v.shape[:3]
    sequences = _sequences(batch, cu_seqlens)
    if batch == 0 or tokens == 0 or sequences == 0 or value_heads == 0:
        return "empty tensors"
    if tokens > 2**31 - 64 or sequences * value_heads > 2**31 - 1024:
        return f"T={tokens}, {sequences} sequences of {value_heads} heads: the kernel counts in 32 bits"
    return None


def _chunk_params(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: KdaOptions,
    state_v_first: bool,
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """What both directions read, and the tensors, some of them copies, that are to live until it is launched."""
    dtypes = _dtypes()
    batch, tokens, heads, _ = q.shape
    q, q_view = _tma_view(q)
    k, k_view = _tma_view(k)
    v, v_view = _tma_view(v)
    g, g_view = _tma_view(g)
    A_log = None if A_log is None else _dense_float(A_log)
    dt_bias = None if dt_bias is None else _dense_float(dt_bias)
    initial_state = None if initial_state is None else _aligned(initial_state)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    params = _extension().ChunkKdaParams(
        q_view,
        k_view,
        v_view,
        g_view,
        (beta.data_ptr(), *beta.stride()),
        _address(A_log),
        _address(dt_bias),
        _address(initial_state),
        _address(cu_seqlens),
        batch,
        tokens,
        heads,
        v.shape[2],
        _sequences(batch, cu_seqlens),
        dtypes[q.dtype],
        dtypes[g.dtype],
        dtypes[beta.dtype],
        cu_seqlens is not None and cu_seqlens.dtype is torch.int64,
        state_v_first,
        *_option_arguments(options),
    )
    return params, (q, k, v, g, A_log, dt_bias, initial_state, cu_seqlens)


def chunk_kda(
    o: Tensor,
    final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: KdaOptions,
    *,
    state_v_first: bool,
    batch_invariant: bool = False,
) -> None:
    """Launches the prefill kernel on the current stream; writes o and final_state, both dense."""
    device = q.device
    batch, tokens, value_heads = v.shape[:3]
    sequences = _sequences(batch, cu_seqlens)
    # A copy is freed as this returns, in the order of the current stream, where the kernel runs.
    params, _alive = _chunk_params(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options, state_v_first)
    size = _forward_workspace_bytes(
        sequences, value_heads, tokens, cu_seqlens is not None, batch_invariant, _sm_count(device)
    )
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    _launch(
        _extension().chunk_kda_fwd,
        device,
        params,
        o.data_ptr(),
        _address(final_state),
        batch_invariant,
        _address(workspace),
    )


def chunk_kda_transition(
    M: Tensor,
    B: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    options: KdaOptions,
    *,
    state_v_first: bool,
) -> None:
    """Launches the transition kernel on the current stream; writes M and B, both dense and fp32."""
    device = k.device
    sequences = _sequences(v.shape[0], cu_seqlens)
    # A copy is freed as this returns, in the order of the current stream, where the kernel runs.
    params, _alive = _chunk_params(k, k, v, g, beta, A_log, dt_bias, None, cu_seqlens, options, state_v_first)
    size = _transition_workspace_bytes(sequences, cu_seqlens is not None)
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None

    _launch(
        _extension().chunk_kda_transition,
        device,
        params,
        M.data_ptr(),
        B.data_ptr(),
        _address(workspace),
    )


def chunk_kda_paged_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    cu_seqlens: Tensor | None,
) -> str | None:
    """Why the prefill kernel does not work on this (valid) pool, or None if it does. Reads no tensor's values."""
    reason = chunk_kda_reason(q, k, v, g, beta, None, None, None, cu_seqlens)
    if reason is not None:
        return reason
    if state_pool.shape[0] > 2**31 - 1:
        return f"state_pool has {state_pool.shape[0]} rows: the kernel counts in 32 bits"
    return _pool_reason(state_pool)


def chunk_kda_paged(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    state_indices: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    has_initial_state: Tensor | None,
    checkpoint_offsets: Tensor | None,
    checkpoint_indices: Tensor | None,
    options: KdaOptions,
    *,
    state_v_first: bool,
    batch_invariant: bool,
) -> None:
    """Launches the prefill kernel on the current stream; writes all of o, dense, and rows of state_pool."""
    device = q.device
    tokens, value_heads = v.shape[1:3]
    params, _alive = _chunk_params(q, k, v, g, beta, A_log, dt_bias, None, cu_seqlens, options, state_v_first)
    has_initial_state = None if has_initial_state is None else has_initial_state.contiguous()
    checkpoints = 0
    if checkpoint_offsets is not None and checkpoint_indices is not None:
        checkpoints = checkpoint_offsets.shape[1]
        checkpoint_offsets, checkpoint_indices = checkpoint_offsets.contiguous(), checkpoint_indices.contiguous()
    size = _forward_workspace_bytes(
        state_indices.shape[0], value_heads, tokens, cu_seqlens is not None, batch_invariant, _sm_count(device),
        True, checkpoints,
    )  # fmt: skip
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None

    _launch(
        _extension().chunk_kda_paged,
        device,
        params,
        o.data_ptr(),
        state_pool.data_ptr(),
        _dtypes()[state_pool.dtype],
        state_pool.shape[0],
        state_pool.stride(0),
        _indices(state_indices),
        _address(has_initial_state),
        checkpoints,
        _indices(checkpoint_offsets),
        _indices(checkpoint_indices),
        batch_invariant,
        _address(workspace),
    )


def chunk_kda_backward(
    grads: Sequence[Tensor | None],
    do: Tensor | None,
    dht: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: KdaOptions,
    *,
    state_v_first: bool,
) -> None:
    """Launches the backward kernels on the current stream; writes grads.

    grads are those of q, k, v, g, beta, A_log, dt_bias and initial_state: dense, in the dtypes of what they are of, or
    None where they are not wanted.
    """
    device = q.device
    batch, tokens, value_heads = v.shape[:3]
    sequences = _sequences(batch, cu_seqlens)
    # A copy is freed as this returns, in the order of the current stream, where the kernels run.
    params, _alive = _chunk_params(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options, state_v_first)
    do, do_view = _tma_view(v.new_zeros(v.shape) if do is None else do)
    dht = None if dht is None else _aligned(dht)
    size = _backward_workspace_bytes(
        batch, sequences, q.shape[2], value_heads, tokens, cu_seqlens is not None, _sm_count(device)
    )
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    dq, dk, dv, dg, dbeta, dA_log, d_dt_bias, d_initial_state = grads
    # The kernels write sums over tokens in fp32.
    A_log_sums, dt_bias_sums = (
        x if x is None or x.dtype is torch.float32 else torch.empty_like(x, dtype=torch.float32)
        for x in (dA_log, d_dt_bias)
    )
    _launch(
        _extension().chunk_kda_bwd,
        device,
        params,
        do_view,
        _address(dht),
        _address(dq),
        _address(dk),
        _address(dv),
        _address(dg),
        _address(dbeta),
        _address(A_log_sums),
        _address(dt_bias_sums),
        _address(d_initial_state),
        workspace.data_ptr(),
    )
    for x, sums in ((dA_log, A_log_sums), (d_dt_bias, dt_bias_sums)):
        if x is not None and sums is not None and x is not sums:
            x.copy_(sums)
