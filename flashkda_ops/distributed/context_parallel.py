"""Context parallel: the tokens of a sequence over many ranks.

The tokens a rank holds act on a sequence's state as an affine map, ``S' = S M + B`` (``docs/numerics.md``). So ranks do
not wait for each other token by token: each computes the map of its own tokens (``flashkda::chunk_kda_transition``),
all ranks exchange maps once, each composes those before it to the state that comes in, and runs ``chunk_kda`` from
there. The backward pass is the same with the adjoint maps. Within a rank, segments of its tokens do the same among each
other (``flashkda_ops.segments``).

Of packed sequences at most one enters a rank from the rank before and at most one leaves it for the rank behind. So a
rank's message is one map, however many sequences there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashkda_ops import segments, validation
from flashkda_ops.ops import chunk_kda as _chunk
from flashkda_ops.ops.eager import refuse_gradients
from flashkda_ops.ops.rules import autocast, refuse_forward_mode
from flashkda_ops.validation import (
    INDEX_DTYPES,
    Sizes,
    check_cu_seqlens,
    checks_values,
    require_device,
    require_dtype,
    require_shape,
    require_tensor,
    require_types,
    validate_state,
    validate_tokens,
)

__all__ = ["context_parallel_chunk_kda", "context_parallel_halo"]


class _Axis(NamedTuple):
    """One dimension of the mesh, seen from this rank."""

    group: str  # name of the process group
    size: int
    rank: int


_Axes = tuple[_Axis, ...]  # outermost first: ranks are numbered row-major


def _axes(mesh: DeviceMesh | dist.ProcessGroup) -> _Axes:
    if isinstance(mesh, DeviceMesh):
        dims = range(mesh.ndim)
        axes = tuple(_Axis(mesh.get_group(d).group_name, mesh.size(d), mesh.get_local_rank(d)) for d in dims)
    elif isinstance(mesh, dist.ProcessGroup):
        axes = (_Axis(mesh.group_name, dist.get_world_size(mesh), dist.get_rank(mesh)),)
    else:
        raise ValueError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    if any(axis.rank < 0 for axis in axes):
        raise ValueError("mesh must contain this rank")
    return axes


def _rank(axes: _Axes) -> int:
    rank = 0
    for axis in axes:
        rank = rank * axis.size + axis.rank
    return rank


def _size(axes: _Axes) -> int:
    size = 1
    for axis in axes:
        size *= axis.size
    return size


def _all_gather(x: Tensor, axis: _Axis) -> Tensor:
    """``x`` of every rank along the axis, ``[size, ...]``."""
    # The ops behind torch's functional collectives: their Python wrappers changed names between releases.
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous().unsqueeze(0), axis.size, axis.group)
    return torch.ops._c10d_functional.wait_tensor(gathered)


def _incoming(own: Tensor, axes: _Axes, *, packed: bool, reverse: bool = False) -> Tensor:
    """What the maps of all ranks before this one make of a zero state; of all behind it with ``reverse``.

    One all-gather for each dimension of the mesh, the innermost first: a row of ranks acts as one map on the next.
    """
    K = own.shape[-2]
    before: list[Tensor] = []  # maps from the start of a row to this rank, innermost row first
    for i, axis in enumerate(reversed(axes)):
        maps = _all_gather(own, axis).movedim(0, -3)
        maps, rank = (maps.flip(-3), axis.size - 1 - axis.rank) if reverse else (maps, axis.rank)
        if rank > 0:
            before.append(segments.composed(maps[..., :rank, :, :], packed=packed))
        if i + 1 < len(axes):
            own = segments.composed(maps, packed=packed)
    if not before:
        return torch.zeros_like(own[..., K:])
    *later, first = before
    S = first[..., K:]
    for map in reversed(later):
        S = segments.applied(map, S, packed=packed)
    return S


def _layout(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, rank_offsets: Tensor | None, axes: _Axes, batch_invariant: bool
) -> segments.Layout:
    # With batch_invariant, sequences are cut by ranks alone.
    n = 1 if batch_invariant else segments.count(q.shape[0] * v.shape[2], q.shape[1], packed=cu_seqlens is not None)
    return segments.layout(q, cu_seqlens, n, rank_offsets=rank_offsets, rank=_rank(axes), ranks=_size(axes))


# ---------------------------------------------------------------------------------------------------------------------
# The function
# ---------------------------------------------------------------------------------------------------------------------


class _ContextParallel(torch.autograd.Function):
    """``flashkda::chunk_kda`` over ranks.

    The backward pass is written out: to differentiate through the exchange would take the gradients of the maps, a
    second backward pass over all tokens with ``V + K`` columns in place of one scan for ``C``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        rank_offsets: Tensor | None,
        scale: float | None,
        l2norm: bool,
        gate: bool,
        sigmoid: bool,
        negative: bool,
        lower_bound: float | None,
        v_first: bool,
        batch_invariant: bool,
        axes: _Axes,
    ) -> tuple[Tensor, Tensor]:
        layout = _layout(q, v, cu_seqlens, rank_offsets, axes, batch_invariant)
        tokens = [layout.tokens(x) for x in (q, k, v, g, beta)]
        gates = segments.Gates(A_log, dt_bias, l2norm, gate, sigmoid, negative, lower_bound)
        incoming = partial(_incoming, axes=axes, packed=layout.packed)
        M, initial = segments.entered(layout, tokens[1:], gates, initial_state, v_first, incoming)
        options = (l2norm, gate, sigmoid, negative, lower_bound, v_first)
        o, final, _ = torch.ops.flashkda.chunk_kda(
            *tokens, A_log, dt_bias, initial, layout.cu_seqlens, scale, True, *options, 0, batch_invariant
        )
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, rank_offsets, initial, M)
        ctx.options, ctx.batch_invariant, ctx.axes = (scale, *options), batch_invariant, axes
        o = torch.ops.aten._unsafe_view(o, v.shape)  # nobody else holds it: to autograd no view, so it may be changed
        return o, layout.final_states(final)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *differentiable, cu_seqlens, rank_offsets, initial, M = ctx.saved_tensors
        q, v = differentiable[0], differentiable[2]
        layout = _layout(q, v, cu_seqlens, rank_offsets, ctx.axes, ctx.batch_invariant)
        do, *tokens = (layout.tokens(x) for x in (do, *differentiable[:5]))
        inputs, needed = (*tokens, *differentiable[5:]), [bool(n) for n in ctx.needs_input_grad[:8]]
        incoming = partial(_incoming, axes=ctx.axes, packed=layout.packed, reverse=True)
        with torch.autocast(q.device.type, enabled=False):  # as forward
            grads = segments.gradients(layout, do, dfinal, inputs, initial, M, ctx.options, needed, incoming)
        *grads, dinitial = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        grads = [None if dx is None else dx.view(x.shape) for dx, x in zip(grads, differentiable, strict=True)]
        return (*grads, dinitial, *[None] * 11)


def context_parallel_chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    rank_offsets: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    batch_invariant: bool = False,
    validate: bool = False,
    check_ranks: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """:func:`flashkda_ops.chunk_kda` on sequences that lie over the ranks of a mesh, in their order.

    Every rank of the mesh calls it with its own tokens and gets its own outputs; the backward pass, too, is run by all.
    Differentiable once. Forward and backward each exchange one map of ``K * K + V * K`` fp32 numbers a head and row
    (packed sequences: a head) in one all-gather a dimension of the mesh. Nothing is read on the host, so it is one
    graph under ``torch.compile`` and can be captured in a CUDA graph, to be replayed with other ``cu_seqlens`` and
    ``rank_offsets``.

    Args:
        q, k, v, g, beta: this rank's tokens, shaped as for :func:`flashkda_ops.chunk_kda`. Without ``cu_seqlens`` each
            of the ``B`` rows is a sequence, its tokens those of rank 0, then those of rank 1, ...; ranks may hold
            different numbers of them, none included.
        mesh: a process group, or a device mesh whose ranks count row-major. With ``R`` ranks, a mesh of two dimensions
            of ``sqrt(R)`` exchanges ``2 * sqrt(R)`` maps in place of ``R``.
        initial_state: of all ``N`` sequences, on every rank, where those rows are read whose sequence starts there.
            Its gradient is that of what was read: zero in the other rows.
        output_final_state: return the final states.
        cu_seqlens: ``[N + 1]``, the same on all ranks: the sequences in the row of all ranks' tokens. It may end before
            the row does.
        rank_offsets: with ``cu_seqlens``: ``[R + 1]``, int32 or int64 on the device, the same on all ranks: rank ``r``
            holds tokens ``rank_offsets[r]`` to ``rank_offsets[r + 1]`` of the row, as the first of its ``T``; those
            past them are padding. By default each has ``T``.
        validate: check the values of ``cu_seqlens`` and ``rank_offsets`` on the host, and that all ranks have the same.
        check_ranks: first compare sizes, dtypes and options of all ranks: one more small all-gather, and a
            synchronisation with the device. Left out while compiling and in the capture of a CUDA graph; what checks
            values does this, too.
        The others: see :func:`flashkda_ops.chunk_kda`; without ``use_gate_in_kernel``, ``A_log``, ``dt_bias`` and
        ``lower_bound`` must be None. Gradients of ``A_log`` and ``dt_bias`` are those of this rank's tokens.

    Returns:
        ``o [B, T, HV, V]`` of this rank's tokens, and the final states of all ``N`` sequences or None. Their rows are
        zero where the sequence does not end here (the sum over the ranks is the whole). An empty sequence starts and
        ends on the rank that holds its place.

    Raises:
        ValueError: naming the argument that is not as described, or what differs between ranks, on all of them. (A
            ``mesh`` that is none, or that does not contain this rank, is an error on this rank alone.)
    """
    axes = _axes(mesh)
    call = _chunk.Arguments(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound,
        state_v_first, 0, batch_invariant, validate,
    )  # fmt: skip
    if torch.compiler.is_compiling():  # the ops check what they are given
        call = _chunk.Arguments._make(autocast(call))
    else:
        call = _prepared(call, rank_offsets, mesh, axes, check_ranks)
    if _size(axes) == 1:
        if rank_offsets is not None and cu_seqlens is not None:
            call = call._replace(cu_seqlens=torch.minimum(cu_seqlens, rank_offsets[1]))
        o, final_state, _ = torch.ops.flashkda.chunk_kda(*call)
    else:
        with torch.autocast(call.q.device.type, enabled=False):  # maps are composed in fp32
            o, final_state = _ContextParallel.apply(*call[:9], rank_offsets, scale, *call[11:17], batch_invariant, axes)
    return o, final_state if output_final_state else None


# ---------------------------------------------------------------------------------------------------------------------
# What ranks must agree on
# ---------------------------------------------------------------------------------------------------------------------


def _validate(call: _chunk.Arguments, rank_offsets: Tensor | None, axes: _Axes) -> Sizes:
    sizes = validate_tokens(call)
    validate_state("initial_state", call.initial_state, call.q, sizes, call.state_v_first)
    if rank_offsets is not None:
        if call.cu_seqlens is None:
            raise ValueError(
                "rank_offsets requires cu_seqlens: the ranks of a dense batch may hold any number of tokens"
            )
        require_tensor("rank_offsets", rank_offsets, optional=True)
        require_shape("rank_offsets", rank_offsets, "R + 1", _size(axes) + 1)
        require_dtype("rank_offsets", rank_offsets, INDEX_DTYPES)
        require_device("rank_offsets", rank_offsets, call.q)
    return sizes


def _device(mesh: DeviceMesh | dist.ProcessGroup, x: object) -> torch.device:
    """Where ranks tell each other of their calls: by the mesh, since a rank may have no tensor that could tell."""
    if isinstance(mesh, DeviceMesh):
        kind = mesh.device_type
    else:
        kinds = [device.type for device in mesh._device_types]
        kind = "cpu" if "cpu" in kinds or not kinds else kinds[0]
    return x.device if isinstance(x, Tensor) and x.device.type == kind else torch.device(kind)


def _table(values: Tensor, axes: _Axes) -> list[list[int]]:
    """A vector of integers of every rank, in their order, on the host."""
    rows = values.unsqueeze(0)
    for axis in reversed(axes):
        rows = _all_gather(rows, axis).flatten(0, 1)
    return rows.tolist()


def _is_captured() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_Facts = dict[str, int]
_MOST_FACTS = 32
_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)
_DEVICES = ("cpu", "cuda", "xpu", "mps")
_R = TypeVar("_R")


def _shown(name: str, value: int) -> object:
    if name.startswith("dtype"):
        return _DTYPES[value] if value >= 0 else "another"
    if name.startswith("device"):
        return _DEVICES[value] if value >= 0 else "another"
    return value


def _number(x: object, among: tuple[object, ...]) -> int:
    return among.index(x) if x in among else -1


def _on_all_ranks(
    prepare: Callable[[], tuple[_R, _Facts]], mesh: DeviceMesh | dist.ProcessGroup, axes: _Axes, x: object
) -> _R:
    """What ``prepare`` returns, besides facts that must be the same on all ranks. All ranks raise where they are not,
    or where ``prepare`` raises on any, whatever it is: one that left at once would have the others wait for it."""
    result: _R | None = None
    facts: _Facts = {}
    error: Exception | None = None
    try:
        result, facts = prepare()
    except Exception as e:
        error = e
    members = mesh.mesh.tolist() if isinstance(mesh, DeviceMesh) else dist.get_process_group_ranks(mesh)
    facts = {"mesh": zlib.crc32(repr(members).encode()), "error": int(error is not None), **facts}
    row = [*facts.values(), *[0] * (_MOST_FACTS - len(facts))]
    table = _table(torch.tensor(row, device=_device(mesh, x)), axes)
    if error is not None:
        raise error
    for name, values in zip(facts, zip(*table, strict=True), strict=False):
        if name == "error" and any(values):
            ranks = ", ".join(str(rank) for rank, value in enumerate(values) if value)
            raise ValueError(f"arguments must be valid on all ranks of the mesh, got an error on rank {ranks}")
        if len(set(values)) > 1:
            shown = [_shown(name, value) for value in values]
            raise ValueError(f"{name} must be the same on all ranks of the mesh, got by rank: {shown}")
    return result  # type: ignore[return-value]


def _prepared(
    call: _chunk.Arguments,
    rank_offsets: Tensor | None,
    mesh: DeviceMesh | dist.ProcessGroup,
    axes: _Axes,
    check_ranks: bool,
) -> _chunk.Arguments:
    """The call with its tokens in the dtype of autocast. Raises where it is not valid, if possible on all ranks."""

    def prepare() -> tuple[_chunk.Arguments, _Facts]:
        require_types(_chunk.op, call)
        refuse_gradients(call[9:])
        refuse_forward_mode("context_parallel_chunk_kda", call)
        if _size(axes) > 1 and torch._C._are_functorch_transforms_active():
            raise RuntimeError("context_parallel_chunk_kda must not be under the transforms of torch.func")
        cast = _chunk.Arguments._make(autocast(call))
        sizes = _validate(cast, rank_offsets, axes)
        return cast, _facts(cast, rank_offsets, sizes)

    check_ranks = check_ranks or call.validate is True or validation.CHECK_VALUES
    if check_ranks and _size(axes) > 1 and not _is_captured():
        cast = _on_all_ranks(prepare, mesh, axes, call.q)
    else:
        cast, _ = prepare()
    if checks_values(cast.validate, cast.q):
        _check_values(cast, rank_offsets, axes)
    return cast


def _facts(call: _chunk.Arguments, rank_offsets: Tensor | None, sizes: Sizes) -> _Facts:
    """What must be the same on all ranks."""
    given = {**call._asdict(), "rank_offsets": rank_offsets}
    tensors = {name: given[name] for name in (*_chunk.Arguments._fields[:9], "rank_offsets")}
    dtypes = {f"dtype of {name}": None if x is None else x.dtype for name, x in tensors.items()}
    facts = {
        "device of q": _number(call.q.device.type, _DEVICES),
        **{name: _number(dtype, _DTYPES) for name, dtype in dtypes.items()},
        **{f"size {letter}": size for letter, size in zip(Sizes._fields, sizes, strict=True)},
        "options": zlib.crc32(repr(call[9:]).encode()),
        "check of values": int(checks_values(call.validate, call.q)),
        "need of gradients": int(torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call[:8])),
    }
    if call.cu_seqlens is None or rank_offsets is not None:
        facts["size T"] = 0  # may differ
    return facts


def _check_values(call: _chunk.Arguments, rank_offsets: Tensor | None, axes: _Axes) -> None:
    """``cu_seqlens`` and ``rank_offsets`` are well formed and the same on all ranks; all raise where they are not."""
    if call.cu_seqlens is None:
        return
    cu_seqlens = _agreed("cu_seqlens", call.cu_seqlens, axes)
    held = [tokens for (tokens,) in _table(torch.tensor([call.q.shape[1]], device=call.q.device), axes)]
    offsets = [0, *accumulate(held)] if rank_offsets is None else _agreed("rank_offsets", rank_offsets, axes)
    if offsets[0] != 0:
        raise ValueError(f"rank_offsets must start at 0, got {offsets[0]}")
    for rank, ((start, end), tokens) in enumerate(zip(pairwise(offsets), held, strict=True)):
        if not 0 <= end - start <= tokens:
            raise ValueError(f"rank_offsets must give rank {rank} from 0 to T = {tokens} tokens, got {end - start}")
    check_cu_seqlens(torch.tensor(cu_seqlens), offsets[-1])


def _agreed(name: str, x: Tensor, axes: _Axes) -> list[int]:
    first, *others = _table(x, axes)
    for rank, values in enumerate(others, 1):
        if values != first:
            raise ValueError(f"{name} must be the same on all ranks, got {first} on rank 0 and {values} on rank {rank}")
    return first


# ---------------------------------------------------------------------------------------------------------------------
# Tokens from the rank before, for convolutions
# ---------------------------------------------------------------------------------------------------------------------


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, axes: _Axes) -> Tensor:
        ctx.shape, ctx.axes = x.shape, axes
        return _neighbour(x[:, x.shape[1] - size :], axes, -1)

    @staticmethod
    def backward(ctx: Any, dhalo: Tensor) -> tuple[Tensor | None, ...]:
        dtail = _neighbour(dhalo, ctx.axes, 1)
        dx = dtail.new_zeros(ctx.shape)
        dx[:, ctx.shape[1] - dtail.shape[1] :] = dtail
        return dx, None, None


def _neighbour(x: Tensor, axes: _Axes, step: int) -> Tensor:
    """``x`` of the rank ``step`` further on; zeros where there is none."""
    rank, ranks = _rank(axes) + step, x.unsqueeze(0)
    for axis in reversed(axes):
        ranks = _all_gather(ranks, axis).flatten(0, 1)
    return ranks[rank].clone() if 0 <= rank < _size(axes) else torch.zeros_like(x)


def context_parallel_halo(
    x: Tensor, size: int, mesh: DeviceMesh | dist.ProcessGroup, *, check_ranks: bool = True
) -> Tensor:
    """The last ``size`` tokens of the rank before this one, ``[B, size, ...]``; zeros on the first rank.

    What a causal convolution of ``size + 1`` taps reads besides the rank's own tokens. Differentiable.

    Args:
        x: ``[B, T, ...]``, this rank's tokens, on all ranks of the same shape but for ``T``, and of the same dtype.
        size: in ``[1, T]``, the same on all ranks.
        mesh: as for :func:`context_parallel_chunk_kda`.
        check_ranks: as for :func:`context_parallel_chunk_kda`.

    Raises:
        ValueError: naming the argument that is not as described, or what differs between ranks, on all of them.
    """
    axes = _axes(mesh)

    def prepare() -> tuple[None, _Facts]:
        require_tensor("x", x)
        if x.dim() < 2:
            raise ValueError(f"x must have shape [B, T, ...], got {x.dim()} dimensions")
        if not isinstance(size, int):
            raise ValueError(f"size must be an int, got {type(size).__name__}")
        if not 1 <= size <= x.shape[1]:
            raise ValueError(f"size must be in [1, T = {x.shape[1]}], got {size}")
        refuse_forward_mode("context_parallel_halo", (x,))
        return None, {
            "size": size,
            "device of x": _number(x.device.type, _DEVICES),
            "dtype of x": _number(x.dtype, _DTYPES),
            "need of gradients": int(torch.is_grad_enabled() and x.requires_grad),
            "number of dimensions of x": x.dim(),
            **{f"size of dimension {d} of x": x.shape[d] for d in range(x.dim()) if d != 1},
        }

    if torch.compiler.is_compiling():
        if not 1 <= size <= x.shape[1]:
            raise ValueError(f"size must be in [1, T = {x.shape[1]}], got {size}")
    elif check_ranks and _size(axes) > 1 and not _is_captured():
        _on_all_ranks(prepare, mesh, axes, x)
    else:
        prepare()
    return _Halo.apply(x, size, axes)
