"""Context parallel: the tokens of a sequence over many ranks.

The tokens a rank holds act on a sequence's state as an affine map, ``S' = S M + B`` (``docs/numerics.md``). So ranks do
not wait for each other token by token: each computes the map of its own tokens (``flashkda::chunk_kda_transition``),
all ranks exchange maps once, each composes those before it to the state that comes in, and runs ``chunk_kda`` from
there. The backward pass is the same with the adjoint maps: ``dS = dS' M^T + C``, where ``C`` is the gradient of the
incoming state from the rank's own outputs.

Of packed sequences at most one enters a rank from the rank before and at most one leaves it for the rank behind. So a
rank's message is one map, however many sequences there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashkda_ops.ops import chunk_kda as _chunk
from flashkda_ops.ops.rules import autocast
from flashkda_ops.validation import (
    INDEX_DTYPES,
    Sizes,
    check_cu_seqlens,
    checks_values,
    require_device,
    require_dtype,
    require_shape,
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
        return tuple(_Axis(mesh.get_group(d).group_name, mesh.size(d), mesh.get_local_rank(d)) for d in dims)
    return (_Axis(mesh.group_name, dist.get_world_size(mesh), dist.get_rank(mesh)),)


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


# ---------------------------------------------------------------------------------------------------------------------
# Affine maps of K-first states, M S + B, as one tensor [M | B] of shape [..., K, K + V]
# ---------------------------------------------------------------------------------------------------------------------


def _composed(maps: Tensor) -> Tensor:
    """One map for ``n >= 1`` of them ``[n, ...]``, the first applied first, in a tree."""
    K = maps.shape[-2]
    while maps.shape[0] > 1:
        n = maps.shape[0]
        first, second = maps[0 : n - 1 : 2], maps[1:n:2]
        pairs = second[..., :K] @ first
        pairs[..., K:] += second[..., K:]
        maps = torch.cat((pairs, maps[n - 1 :])) if n % 2 else pairs
    return maps[0]


def _incoming(M: Tensor, B: Tensor, axes: _Axes, *, reverse: bool = False) -> Tensor:
    """What the maps of all ranks before this one make of a zero state; of all behind it with ``reverse``.

    One all-gather for each dimension of the mesh, the innermost first: a row of ranks acts as one map on the next.
    """
    own = torch.cat((M, B), -1)
    before: list[Tensor] = []  # maps from the start of a row to this rank, innermost row first
    for i, axis in enumerate(reversed(axes)):
        maps = _all_gather(own, axis)
        maps, rank = (maps.flip(0), axis.size - 1 - axis.rank) if reverse else (maps, axis.rank)
        if rank > 0:
            before.append(_composed(maps[:rank]))
        if i + 1 < len(axes):
            own = _composed(maps)
    S = torch.zeros_like(B)
    for x in reversed(before):
        M, B = x.split((M.shape[-1], B.shape[-1]), -1)
        S = M @ S + B
    return S


# ---------------------------------------------------------------------------------------------------------------------
# Where the sequences lie
# ---------------------------------------------------------------------------------------------------------------------


class _Slice(NamedTuple):
    """The sequences as this rank sees them, all on the device. Masks and rows are of the ``N`` sequences.

    A *span* is a place for a sequence that goes over the rank's edges: one for packed sequences, ``B`` for dense ones.
    """

    starts: Tensor  # [N]: the sequence's first token is here (of an empty one, its place)
    ends: Tensor  # [N]: its last token is
    enters: Tensor  # [N]: it comes in from a rank before
    leaves: Tensor  # [N]: it goes on to a rank behind
    entering: Tensor  # [spans]: the sequence that enters, any where none does
    leaving: Tensor  # [spans]: the sequence that leaves, any where none does
    cu_seqlens: Tensor | None  # [N + 1], of the tokens that are here
    # [2] each, the first and the last token + 1 here of what enters and of what leaves; None for several dense rows.
    entering_part: Tensor | None
    leaving_part: Tensor | None


def _slice(q: Tensor, cu_seqlens: Tensor | None, rank_offsets: Tensor | None, axes: _Axes) -> _Slice:
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return _dense_slice(B, T, axes, q.device)
    if rank_offsets is None:
        rank_offsets = torch.arange(_size(axes) + 1, device=q.device) * T
    return _packed_slice(cu_seqlens, rank_offsets, _rank(axes))


def _dense_slice(B: int, T: int, axes: _Axes, device: torch.device) -> _Slice:
    rank, last = _rank(axes), _size(axes) - 1

    def all_or_none(mask: bool) -> Tensor:
        return torch.full((B,), mask, device=device)

    def part(mask: bool) -> Tensor | None:
        return torch.arange(2, device=device) * (T if mask else 0) if B == 1 else None

    every = torch.arange(B, device=device)
    return _Slice(
        starts=all_or_none(rank == 0),
        ends=all_or_none(rank == last),
        enters=all_or_none(rank > 0),
        leaves=all_or_none(rank < last),
        entering=every,
        leaving=every,
        cu_seqlens=None,
        entering_part=part(rank > 0),
        leaving_part=part(rank < last),
    )


def _packed_slice(cu_seqlens: Tensor, rank_offsets: Tensor, rank: int) -> _Slice:
    offsets = rank_offsets.long().cummax(0).values
    cu = torch.minimum(cu_seqlens.long().cummax(0).values, offsets[-1])
    low, high = offsets[rank], offsets[rank + 1]
    first, end = cu[:-1], cu[1:]
    ranks = offsets.shape[0] - 1

    def holds(token: Tensor) -> Tensor:
        """Whether this rank holds the token; what lies past all ranks is the last one's."""
        return torch.searchsorted(offsets[1:].contiguous(), token, right=True).clamp(max=ranks - 1) == rank

    enters, leaves = (first < low) & (end > low), (first < high) & (end > high)
    entering, leaving = (mask.to(torch.int8).argmax().unsqueeze(0) for mask in (enters, leaves))
    here = torch.minimum((cu - low).clamp(min=0), high - low)

    def part(mask: Tensor, sequence: Tensor) -> Tensor:
        """The tokens here of the one sequence of the mask; none where there is none."""
        return torch.where(mask.any(), here[torch.cat((sequence, sequence + 1))], 0)

    return _Slice(
        starts=holds(first),
        ends=holds(torch.maximum(end - 1, first)),
        enters=enters,
        leaves=leaves,
        entering=entering,
        leaving=leaving,
        cu_seqlens=here,
        entering_part=part(enters, entering),
        leaving_part=part(leaves, leaving),
    )


def _where(mask: Tensor, states: Tensor, other: Tensor | None = None) -> Tensor:
    """``states`` where the mask of their rows says so, else ``other``, else zero: whatever they hold elsewhere."""
    mask = mask.view(-1, 1, 1, 1)
    return torch.where(mask, states, 0) if other is None else torch.where(mask, states, other)


# ---------------------------------------------------------------------------------------------------------------------
# This rank's maps
# ---------------------------------------------------------------------------------------------------------------------

# Tokens at a rank's edge that come first. Where they forget, in every head, whatever state they are entered with, the
# others do not matter: these are then passed as no tokens at all, for which kernels only fill outputs. The device alone
# knows.
EDGE = 2048
# Longer parts are cut into segments of this many tokens, whose maps are computed side by side.
SEGMENT = 4096
# A map with no entry above this leaves of a state less than rounding does.
_FORGOTTEN = {torch.float32: 1e-12, torch.float64: 1e-22}


class _Gated(NamedTuple):
    """What a transition is made of, apart from the tokens."""

    A_log: Tensor | None
    dt_bias: Tensor | None
    l2norm: bool
    gate: bool
    sigmoid: bool
    negative: bool
    lower_bound: float | None


def _transition(tokens: Sequence[Tensor], cu_seqlens: Tensor | None, o: _Gated) -> Tensor:
    """``[M | B]`` of each sequence of ``k, v, g, beta``."""
    M, B = torch.ops.flashkda.chunk_kda_transition(*tokens, o.A_log, o.dt_bias, cu_seqlens, *o[2:])
    return torch.cat((M, B), -1)


def _map_of_part(tokens: Sequence[Tensor], part: Tensor, o: _Gated) -> Tensor:
    """``[M | B]`` of the tokens ``part[0]`` to ``part[1]``; the identity and zero where there are none."""
    segments = max(1, -(-tokens[0].shape[1] // SEGMENT))
    edges = torch.arange(segments + 1, device=part.device) * SEGMENT
    edges[segments] = tokens[0].shape[1]
    cu_seqlens = F.pad(torch.minimum(torch.maximum(edges, part[0]), part[1]), (1, 0))
    return _composed(_transition(tokens, cu_seqlens, o)[1:]).unsqueeze(0)


def _forgets(map: Tensor) -> Tensor:
    """Whether nothing of a state is left after the map, in any head."""
    return map[..., : map.shape[-2]].abs().amax() < _FORGOTTEN[map.dtype]


def _leaving_map(tokens: Sequence[Tensor], part: Tensor | None, o: _Gated) -> Tensor:
    """``[M | B] [spans, ...]`` of the tokens here of what leaves."""
    if part is None:
        return _transition(tokens, None, o)
    cut = tokens[0].shape[1] - EDGE
    if cut <= 0:
        return _map_of_part(tokens, part, o)
    last = _map_of_part([x[:, cut:] for x in tokens], (part - cut).clamp(min=0), o)
    rest = torch.where(_forgets(last), 0, part.clamp(max=cut))
    return _composed(torch.stack((_map_of_part([x[:, :cut] for x in tokens], rest, o), last)))


def _entering_gradient(
    inputs: Sequence[Tensor | None],
    do: Tensor,
    dstates: Tensor,
    s: _Slice,
    options: tuple[Any, ...],
) -> Tensor:
    """The gradient ``[spans, ...]`` of what enters, from the outputs here and the states ``[N, ...]`` that end here.

    Args:
        inputs: ``q, k, v, g, beta, A_log, dt_bias`` of ``flashkda::chunk_kda``.
        options: the arguments of ``flashkda::chunk_kda_backward`` from ``scale`` to ``batch_invariant``.
    """
    *tokens, A_log, dt_bias = inputs
    only_state = [False] * 7 + [True]

    def through(a: int, b: int, dS: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """From the gradient of the state after rows ``a`` to ``b`` to that of the state before them."""
        rows = [x[:, a:b] for x in tokens if x is not None]
        return torch.ops.flashkda.chunk_kda_backward(
            do[:, a:b], dS, *rows, A_log, dt_bias, torch.zeros_like(dS), cu_seqlens, *options, only_state
        )[7]

    T, dS = do.shape[1], dstates[s.entering]
    if s.entering_part is None:
        return through(0, T, dS, None)
    part = s.entering_part  # from 0
    if T > EDGE:
        gated = _Gated(A_log, dt_bias, *options[1:6])
        first = _map_of_part([x[:, :EDGE] for x in tokens[1:] if x is not None], part.clamp(max=EDGE), gated)
        dS = through(EDGE, T, dS, torch.where(_forgets(first), 0, (part - EDGE).clamp(min=0)))
    return through(0, min(T, EDGE), dS, part.clamp(max=EDGE))


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
        s = _slice(q, cu_seqlens, rank_offsets, axes)
        gated = _Gated(A_log, dt_bias, l2norm, gate, sigmoid, negative, lower_bound)
        M, B = _leaving_map((k, v, g, beta), s.leaving_part, gated).split((k.shape[-1], v.shape[-1]), -1)
        own = None
        if initial_state is not None:
            own = _where(s.starts, initial_state.mT if v_first else initial_state)
            B = B + M @ _where(s.leaves, own)[s.leaving]
        M = _where((s.enters & s.leaves)[s.leaving], M)  # a sequence that starts here ends in B, whatever came before
        B = _where(s.leaves[s.leaving], B)
        entering = _where(s.enters, _incoming(M, B, axes), own)
        entering = (entering.mT if v_first else entering).contiguous()
        options = (l2norm, gate, sigmoid, negative, lower_bound, v_first)
        o, final, _ = torch.ops.flashkda.chunk_kda(
            q, k, v, g, beta, A_log, dt_bias, entering, s.cu_seqlens, scale, True, *options, 0, batch_invariant
        )
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, entering, M, *s)
        ctx.options, ctx.v_first, ctx.axes = (scale, *options, batch_invariant), v_first, axes
        return o, _where(s.ends, final)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, A_log, dt_bias, entering, M, *slice_ = ctx.saved_tensors
        s, inputs = _Slice(*slice_), (q, k, v, g, beta, A_log, dt_bias)
        dht = _where(s.ends, dfinal)
        C = _where(s.enters[s.entering], _entering_gradient(inputs, do, dht, s, ctx.options))
        dS = _incoming(M.mT, C.mT if ctx.v_first else C, ctx.axes, reverse=True)
        dht = _where(s.leaves, dS.mT if ctx.v_first else dS, dht)
        needed = [bool(n) for n in ctx.needs_input_grad[:8]]
        grads = torch.ops.flashkda.chunk_kda_backward(do, dht, *inputs, entering, s.cu_seqlens, *ctx.options, needed)
        *kept, dh0 = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        if dh0 is not None:
            dh0 = _where(s.starts, dh0)
        return (*kept, dh0, *[None] * 11)


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
            synchronisation with the device. Left out while compiling and in the capture of a CUDA graph.
        The others: see :func:`flashkda_ops.chunk_kda`; without ``use_gate_in_kernel``, ``A_log``, ``dt_bias`` and
        ``lower_bound`` must be None. Gradients of ``A_log`` and ``dt_bias`` are those of this rank's tokens.

    Returns:
        ``o [B, T, HV, V]`` of this rank's tokens, and the final states of all ``N`` sequences or None. Their rows are
        zero where the sequence does not end here (the sum over the ranks is the whole). An empty sequence starts and
        ends on the rank that holds its place.

    Raises:
        ValueError: naming the argument that is not as described, or what differs between ranks, on all of them.
    """
    axes = _axes(mesh)
    q, k, v, g, beta = autocast((q, k, v, g, beta))
    call = _chunk.Arguments(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound,
        state_v_first, 0, batch_invariant, validate,
    )  # fmt: skip
    eager = not torch.compiler.is_compiling() and not (q.is_cuda and torch.cuda.is_current_stream_capturing())
    if eager and check_ranks and _size(axes) > 1:
        _check_ranks(call, rank_offsets, mesh, axes)
    if not torch.compiler.is_compiling():  # while tracing, the ops check what they are given
        _validate(call, rank_offsets, axes)
    if eager and checks_values(validate, q):
        _check_values(call, rank_offsets, axes)
    if _size(axes) == 1:
        if rank_offsets is not None and cu_seqlens is not None:
            call = call._replace(cu_seqlens=torch.minimum(cu_seqlens, rank_offsets[1]))
        o, final_state, _ = torch.ops.flashkda.chunk_kda(*call)
    else:
        with torch.autocast(q.device.type, enabled=False):  # maps are composed in fp32
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
        require_shape("rank_offsets", rank_offsets, "R + 1", _size(axes) + 1)
        require_dtype("rank_offsets", rank_offsets, INDEX_DTYPES)
        require_device("rank_offsets", rank_offsets, call.q)
    return sizes


def _table(values: Tensor, axes: _Axes) -> list[list[int]]:
    """A vector of integers of every rank, in their order, on the host."""
    rows = values.unsqueeze(0)
    for axis in reversed(axes):
        rows = _all_gather(rows, axis).flatten(0, 1)
    return rows.tolist()


_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)


def _facts(
    call: _chunk.Arguments, rank_offsets: Tensor | None, mesh: DeviceMesh | dist.ProcessGroup, sizes: Sizes | None
) -> dict[str, int]:
    """What must be the same on all ranks, as numbers. ``sizes`` is None where this rank's arguments are not valid."""
    ranks = mesh.mesh.tolist() if isinstance(mesh, DeviceMesh) else dist.get_process_group_ranks(mesh)
    given = {**call._asdict(), "rank_offsets": rank_offsets}
    tensors = {name: given[name] for name in (*_chunk.Arguments._fields[:9], "rank_offsets")}
    dtypes = {f"dtype of {name}": None if x is None else x.dtype for name, x in tensors.items()}
    s = (0,) * len(Sizes._fields) if sizes is None else sizes
    facts = {
        "mesh": zlib.crc32(repr(ranks).encode()),
        "validity of the arguments": int(sizes is not None),
        **{name: _DTYPES.index(dtype) if dtype in _DTYPES else -1 for name, dtype in dtypes.items()},
        **{f"size {letter}": size for letter, size in zip(Sizes._fields, s, strict=True)},
        "options": zlib.crc32(repr(call[9:]).encode()),
        "need of gradients": int(torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call[:8])),
    }
    if call.cu_seqlens is None or rank_offsets is not None:
        facts["size T"] = 0  # may differ
    return facts


def _check_ranks(
    call: _chunk.Arguments, rank_offsets: Tensor | None, mesh: DeviceMesh | dist.ProcessGroup, axes: _Axes
) -> None:
    """All ranks raise where their calls do not go together. One whose own arguments are bad takes part first."""
    error, sizes = None, None
    try:
        sizes = _validate(call, rank_offsets, axes)
    except ValueError as e:
        error = e
    facts = _facts(call, rank_offsets, mesh, sizes)
    table = _table(torch.tensor(list(facts.values()), device=call.q.device), axes)
    if error is not None:
        raise error
    for name, values in zip(facts, zip(*table, strict=True), strict=True):
        if len(set(values)) > 1:
            shown: list[object] = [_DTYPES[x] for x in values] if name.startswith("dtype") else list(values)
            raise ValueError(f"{name} must be the same on all ranks of the mesh, got by rank: {shown}")


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


def context_parallel_halo(x: Tensor, size: int, mesh: DeviceMesh | dist.ProcessGroup) -> Tensor:
    """The last ``size`` tokens of the rank before this one, ``[B, size, ...]``; zeros on the first rank.

    What a causal convolution of ``size + 1`` taps reads besides the rank's own tokens. Differentiable.

    Args:
        x: ``[B, T, ...]``, this rank's tokens, the same shape on all ranks.
        size: at most ``T``.
        mesh: as for :func:`context_parallel_chunk_kda`.

    Raises:
        ValueError: ``size`` is not in ``[1, T]``.
    """
    T = x.shape[1]
    if not 1 <= size <= T:
        raise ValueError(f"size must be in [1, T = {T}], got {size}")
    return _Halo.apply(x, size, _axes(mesh))
