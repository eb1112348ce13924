"""Tensors to raw pointers: the only module that imports the extension, which it does at the first question about it.

The extension's functions are called by position, since matching forty keywords takes longer than the rest of a call.
"""

from __future__ import annotations

import functools
import importlib
import os
import struct
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkda_ops.options import KdaOptions

_Strides = tuple[int, int, int]
_View = tuple[int, int, int, int]
"""The address of a tensor [B, T, H] or [B, T, H, D], and its strides over the batch, tokens and heads."""

CLUSTERS = os.environ.get("FLASHKDA_CLUSTERS", "")
"""Decides ``may_use_clusters`` by hand (``FLASHKDA_CLUSTERS=0`` or ``1``)."""


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


@functools.cache
def _extension() -> Any:
    extension, status = _load()
    if extension is None:
        raise RuntimeError(f"flashkda_ops has no CUDA kernels: {status}")
    return extension


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

Reading = tuple[Hashable, bool, bytes | None]
"""Of tensors: their layouts, whether any requires a gradient, and their addresses as the extension takes them. Where it
is not the extension that reads, layouts and addresses are None: they are asked for when they are needed."""


def read(tensors: tuple[Tensor | None, ...]) -> Reading | None:
    """What a call on plain tensors begins with, or None where one is more or less than storage, sizes and strides: of
    another type, with a negation still to be done, left behind by a transform of ``torch.func``, without storage."""
    return _reader()(tensors)


@functools.cache
def _reader() -> Callable[[tuple[Tensor | None, ...]], Reading | None]:
    """The extension's, which takes a quarter of the time, where this torch has what it reads tensors by."""
    extension, _ = _load()
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if extension is None or exchange is None:
        return _read
    try:
        return extension.TensorReader(exchange, _PLAIN_TYPES)
    except (TypeError, ValueError):  # of a torch that has another exchange under this name
        return _read


def _read(tensors: tuple[Tensor | None, ...]) -> Reading | None:
    requires_grad = False
    for x in tensors:
        if x is not None:
            if (
                type(x) not in _PLAIN_TYPES
                or x.is_neg()
                or x._is_zerotensor()
                or torch._C._functorch.is_functorch_wrapped_tensor(x)
            ):
                return None
            requires_grad = requires_grad or x.requires_grad
    return None, requires_grad, None


def layouts(tensors: tuple[Tensor | None, ...], reading: Reading | None = None) -> Hashable:
    """Equal for tensors of which all but the contents and the places are: what a plan depends on.

    reading: of the tensors, if they have been read.
    """
    if reading is None:
        reading = read(tensors)
    if reading is not None and reading[0] is not None:
        return reading[0]
    return tuple(
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)  # alignment
        for x in tensors
    )


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


def may_use_clusters() -> bool:
    """Whether scans of few heads may be clusters of 16 blocks, which wait until that much of a GPC is free.

    A communication kernel holds some of each GPC while it waits for another rank; were that in turn to wait for this
    scan, neither would end. So not where ``torch.distributed`` is initialized, nor where another process may have
    kernels beside ours (MPS), unless ``CLUSTERS`` says otherwise. In a green context the launch itself decides.
    """
    if CLUSTERS:
        return CLUSTERS != "0"
    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) and not _is_under_mps()


@functools.cache
def _is_under_mps() -> bool:
    """Whether this process is, or may be, a client of CUDA's multi-process service, found where clients look for it."""
    return os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))


_LEAST_ADDRESS = 1 << 32
"""A GPU's memory lies above it; below, a view into freed storage has its offset for an address."""


def _address(name: str, x: Tensor | None) -> int:
    """Where a kernel finds x, 0 where it is absent. Facts about an address come from it alone: a tensor from DLPack may
    begin anywhere, and the storage of one may have been freed."""
    if x is None:
        return 0
    address = x.data_ptr()
    if address < _LEAST_ADDRESS and x.numel() > 0 and not x.is_meta and x.untyped_storage().data_ptr() == 0:
        raise ValueError(f"{name} must have storage, got a tensor of shape {list(x.shape)} whose storage was freed")
    if address % x.element_size() != 0 and x.is_cuda:
        size = x.element_size()
        raise ValueError(f"{name} must be aligned to its elements of {size} bytes, got address {address:#x}")
    return address


INPUTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")
"""The tensors that both directions of the chunk form read, in the order in which the extension takes them."""


def require_addresses(tensors: Sequence[Tensor | None]) -> None:
    """Raises a ValueError that names the one of ``INPUTS`` that no kernel can read."""
    for name, x in zip(INPUTS, tensors, strict=True):
        _address(name, x)


def _packed_addresses(tensors: Sequence[Tensor | None]) -> bytes:
    return struct.pack(f"{len(INPUTS)}Q", *map(_address, INPUTS, tensors))


def _sequences(batch: int, cu_seqlens: Tensor | None) -> int:
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _tokens_reason(q: Tensor, v: Tensor, *, any_width: bool = False) -> str | None:
    """Why no kernel serves these (valid) tokens, or None if all do."""
    reason = device_reason(q.device)
    if reason is not None:
        return reason
    K, V = q.shape[3], v.shape[3]
    if not any_width and (K != 128 or V != 128):
        return f"K={K}, V={V}: the kernel has K=V=128"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q, k, v are {q.dtype}: the kernel takes bfloat16 or float16"
    return None


def _pool_reason(state_pool: Tensor) -> str | None:
    """Why no kernel takes this (valid) pool beside tokens that it serves."""
    if state_pool.stride()[2:] != (128, 1) or (state_pool.shape[1] > 1 and state_pool.stride(1) != 128 * 128):
        return f"state_pool has strides {state_pool.stride()}: the kernel takes dense rows"
    per_16_bytes = 16 // state_pool.element_size()
    if state_pool.stride(0) % per_16_bytes != 0 or _address("state_pool", state_pool) % 16 != 0:
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


def _loadable_view(name: str, x: Tensor, elements: int = 4) -> tuple[Tensor, _View]:
    """x of [B, T, H, D], or a copy where D is not contiguous or not aligned to loads of that many elements."""
    address, (batch, token, head, last) = _address(name, x), x.stride()
    if last != 1 or (batch | token | head) % elements != 0 or address % (elements * x.element_size()) != 0:
        x = x.clone(memory_format=torch.contiguous_format)
        address, (batch, token, head, last) = x.data_ptr(), x.stride()
    return x, (address, batch, token, head)


def _indices(name: str, x: Tensor | None) -> tuple[int, int, bool]:
    """The address of x, its first stride and whether it is int64."""
    return (0, 0, False) if x is None else (_address(name, x), x.stride(0), x.dtype is torch.int64)


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
    q, q_view = _loadable_view("q", q)
    k, k_view = _loadable_view("k", k)
    v, v_view = _loadable_view("v", v, elements=1)
    g, g_view = _loadable_view("g", g)
    _address("A_log", A_log), _address("dt_bias", dt_bias)  # as they came
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
        (_address("beta", beta), *beta.stride()),
        _address("state_pool", state_pool),
        state_pool.shape[0],
        state_pool.stride(0),
        _indices("state_indices", state_indices),
        slots,
        slot_stride,
        _indices("num_accepted_tokens", num_accepted_tokens),
        _indices("cu_seqlens", cu_seqlens),
        _address("A_log", A_log),
        _address("dt_bias", dt_bias),
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


def _backward_workspace_bytes(
    batch: int, sequences: int, heads: int, value_heads: int, tokens: int, packed: bool, sm_count: int
) -> int:
    return _extension().chunk_kda_bwd_workspace_bytes(batch, sequences, heads, value_heads, tokens, packed, sm_count)


def _tma_strides(x: Tensor) -> _Strides | None:
    """The B, T and H strides of x [B, T, H, D], or None where a TMA descriptor cannot describe it."""
    batch, token, head, last = x.stride()
    per_16_bytes = 16 // x.element_size()
    if last != 1 or x.data_ptr() % 16 != 0:
        return None
    if (batch | token | head) % per_16_bytes != 0 or not (batch and token and head):
        # A stride over a single index is never taken, and may be anything; 0 over several is an expanded tensor's.
        taken = [step for step, size in zip((batch, token, head), x.shape, strict=False) if size > 1]
        if any(step % per_16_bytes != 0 or step == 0 for step in taken):
            return None
    return batch, token, head


def _dense_strides(x: Tensor) -> _Strides:
    _, tokens, heads, D = x.shape
    return tokens * heads * D, heads * D, D


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
    *,
    any_width: bool = False,
) -> str | None:
    """Why the chunk kernels do not serve this (valid) call in either direction, or None if they do.

    Reads no tensor's values. ``any_width``: or would not if its heads had their number of channels.
    """
    reason = _tokens_reason(q, v, any_width=any_width)
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


class ChunkPlan(NamedTuple):
    """What the chunk kernels are told of a call, but for addresses, and which of its tensors they read from copies."""

    params: Any
    copies: tuple[int, ...]
    device: torch.device
    packed: bool
    forward_workspace: tuple[int, int]  # bytes, as sequences may be cut or not
    transition_workspace: int
    backward_workspace: int


_PARAMETERS = (5, 6)  # A_log and dt_bias, which the kernels read as fp32


def chunk_plan(
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
) -> ChunkPlan:
    """The plan of a call that the kernels serve, in both directions: of its tensors and of all like them."""
    tiles = [_tma_strides(x) for x in (q, k, v, g)]
    copies = [i for i, strides in enumerate(tiles) if strides is None]
    for i, x in zip((*_PARAMETERS, 7, 8), (A_log, dt_bias, initial_state, cu_seqlens), strict=True):
        if x is not None:
            fits = x.is_contiguous() and (i not in _PARAMETERS or x.dtype is torch.float32)
            if not fits or (i == 7 and x.data_ptr() % 16 != 0):
                copies.append(i)
    extension, dtypes = _extension(), _dtypes()
    batch, tokens, heads, _ = q.shape
    value_heads, sequences, packed = v.shape[2], _sequences(batch, cu_seqlens), cu_seqlens is not None
    sm_count = _sm_count(q.device)
    params = extension.ChunkKdaParams(
        *(strides or _dense_strides(x) for x, strides in zip((q, k, v, g), tiles, strict=True)),
        beta.stride(),
        batch,
        tokens,
        heads,
        value_heads,
        sequences,
        sm_count,
        dtypes[q.dtype],
        dtypes[g.dtype],
        dtypes[beta.dtype],
        cu_seqlens is not None and cu_seqlens.dtype is torch.int64,
        state_v_first,
        *_option_arguments(options),
    )
    cut, whole = (
        _forward_workspace_bytes(sequences, value_heads, tokens, packed, one_segment, sm_count)
        for one_segment in (False, True)
    )
    backward = _backward_workspace_bytes(batch, sequences, heads, value_heads, tokens, packed, sm_count)
    transition = extension.chunk_kda_transition_workspace_bytes(sequences, packed)
    return ChunkPlan(params, tuple(copies), q.device, packed, (cut, whole), transition, backward)


def _readable(plan: ChunkPlan, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The nine tensors of a call, in copies where a kernel cannot read them as they are."""
    if not plan.copies:
        return tensors
    read = list(tensors)
    for i in plan.copies:
        x = read[i]
        assert x is not None
        _address(INPUTS[i], x)  # as it came, since a copy of freed storage is an illegal access as well
        read[i] = _dense_float(x) if i in _PARAMETERS else x.clone(memory_format=torch.contiguous_format)
    return read


def chunk_kda(
    plan: ChunkPlan,
    o: Tensor,
    final_state: Tensor | None,
    tensors: Sequence[Tensor | None],
    *,
    batch_invariant: bool,
    addresses: bytes | None = None,
) -> None:
    """Launches the prefill kernel on the current stream; writes o and final_state, both dense.

    addresses: those of the tensors, where they have been read.
    """
    if plan.copies or addresses is None:
        # A copy is freed as this returns, in the order of the current stream, where the kernel runs.
        tensors = _readable(plan, tensors)
        addresses = _packed_addresses(tensors)
    size = plan.forward_workspace[batch_invariant]
    workspace = o.new_empty(size, dtype=torch.uint8) if size else None
    _launch(
        _extension().chunk_kda_fwd,
        plan.device,
        plan.params,
        addresses,
        _address("o", o),
        _address("final_state", final_state),
        batch_invariant,
        _address("workspace", workspace),
    )


def chunk_kda_transition(plan: ChunkPlan, M: Tensor, B: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Launches the transition kernel on the current stream; writes M and B, both dense and fp32. Of q it knows nothing:
    k has its place."""
    # A copy is freed as this returns, in the order of the current stream, where the kernel runs.
    tensors = _readable(plan, tensors)
    workspace = M.new_empty(plan.transition_workspace, dtype=torch.uint8) if plan.transition_workspace else None
    _launch(
        _extension().chunk_kda_transition,
        plan.device,
        plan.params,
        _packed_addresses(tensors),
        M.data_ptr(),
        B.data_ptr(),
        _address("workspace", workspace),
    )


def chunk_kda_paged_reason(state_pool: Tensor) -> str | None:
    """Why the prefill kernel does not work on this (valid) pool beside tokens that it serves, or None if it does.

    Reads no tensor's values.
    """
    if state_pool.shape[0] > 2**31 - 1:
        return f"state_pool has {state_pool.shape[0]} rows: the kernel counts in 32 bits"
    return _pool_reason(state_pool)


def chunk_kda_paged(
    plan: ChunkPlan,
    o: Tensor,
    tensors: Sequence[Tensor | None],
    state_pool: Tensor,
    state_indices: Tensor,
    has_initial_state: Tensor | None,
    checkpoint_offsets: Tensor | None,
    checkpoint_indices: Tensor | None,
    *,
    batch_invariant: bool,
) -> None:
    """Launches the prefill kernel on the current stream; writes all of o, dense, and rows of state_pool."""
    tensors = _readable(plan, tensors)
    has_initial_state = None if has_initial_state is None else has_initial_state.contiguous()
    checkpoints = 0
    if checkpoint_offsets is not None and checkpoint_indices is not None:
        checkpoints = checkpoint_offsets.shape[1]
        checkpoint_offsets, checkpoint_indices = checkpoint_offsets.contiguous(), checkpoint_indices.contiguous()
    tokens, value_heads = o.shape[1:3]
    size = _forward_workspace_bytes(
        state_indices.shape[0], value_heads, tokens, plan.packed, batch_invariant, _sm_count(plan.device), True,
        checkpoints,
    )  # fmt: skip
    workspace = o.new_empty(size, dtype=torch.uint8) if size else None
    _launch(
        _extension().chunk_kda_paged,
        plan.device,
        plan.params,
        _packed_addresses(tensors),
        o.data_ptr(),
        _address("state_pool", state_pool),
        _dtypes()[state_pool.dtype],
        state_pool.shape[0],
        state_pool.stride(0),
        _indices("state_indices", state_indices),
        _address("has_initial_state", has_initial_state),
        checkpoints,
        _indices("checkpoint_offsets", checkpoint_offsets),
        _indices("checkpoint_indices", checkpoint_indices),
        batch_invariant,
        _address("workspace", workspace),
    )


def chunk_kda_backward(
    plan: ChunkPlan,
    grads: Sequence[Tensor | None],
    do: Tensor | None,
    dht: Tensor | None,
    tensors: Sequence[Tensor | None],
) -> None:
    """Launches the backward kernels on the current stream; writes grads.

    grads are those of q, k, v, g, beta, A_log, dt_bias and initial_state: dense, in the dtypes of what they are of, or
    None where they are not wanted.
    """
    # A copy is freed as this returns, in the order of the current stream, where the kernels run.
    tensors = _readable(plan, tensors)
    v = tensors[2]
    assert v is not None
    do = v.new_zeros(v.shape) if do is None else do
    _address("do", do), _address("dht", dht)  # as they came
    strides = _tma_strides(do)
    if strides is None:
        do = do.clone(memory_format=torch.contiguous_format)
        strides = _dense_strides(do)
    dht = None if dht is None else _aligned(dht)
    workspace = v.new_empty(plan.backward_workspace, dtype=torch.uint8)
    # The kernels write sums over tokens in fp32.
    written = list(grads)
    for i in _PARAMETERS:
        x = grads[i]
        if x is not None and x.dtype is not torch.float32:
            written[i] = torch.empty_like(x, dtype=torch.float32)
    _launch(
        _extension().chunk_kda_bwd,
        plan.device,
        plan.params,
        _packed_addresses(tensors),
        do.data_ptr(),
        strides,
        _address("dht", dht),
        [0 if x is None else x.data_ptr() for x in written],
        may_use_clusters(),
        workspace.data_ptr(),
    )
    for i in _PARAMETERS:
        x, sums = grads[i], written[i]
        if x is not None and sums is not None and x is not sums:
            x.copy_(sums)
