"""Context parallel: the tokens of a sequence over many ranks.

The tokens a rank holds act on a sequence's state as an affine map, ``S' = S M + B`` (``docs/numerics.md``). So ranks do
not wait for each other token by token: each computes the map of its own tokens (``flashkda::chunk_kda_transition``),
all ranks exchange maps once, each composes those before it to the state that comes in, and runs ``chunk_kda`` from
there. The backward pass is the same with the adjoint maps: ``dS = dS' M^T + C``, where ``C`` is the gradient of the
incoming state from the rank's own outputs.

Within a rank, segments of its tokens do the same among each other: they run side by side, where one long sequence of
few heads would leave most of a GPU idle.

Of packed sequences at most one enters a rank from the rank before and at most one leaves it for the rank behind. So a
rank's message is one map, however many sequences there are; and so it is with segments.
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


def _levels(maps: Tensor) -> list[Tensor]:
    """``n >= 1`` maps ``[..., n, K, K + V]``, those of neighbours composed, and so on up to one map for all.

    The first is applied first.
    """
    levels = [maps]
    while (n := maps.shape[-3]) > 1:
        K = maps.shape[-2]
        first, second = maps[..., 0 : n - 1 : 2, :, :], maps[..., 1:n:2, :, :]
        pairs = second[..., :K] @ first
        pairs[..., K:] += second[..., K:]
        maps = torch.cat((pairs, maps[..., n - 1 :, :, :]), -3) if n % 2 else pairs
        levels.append(maps)
    return levels


def _states_before(levels: list[Tensor], S: Tensor) -> Tensor:
    """The state ``[..., n, K, V]`` before each of the ``n`` maps, where ``S [..., K, V]`` is that before the first."""
    states = S.unsqueeze(-3)
    for maps in reversed(levels[:-1]):
        n = maps.shape[-3]
        before = states[..., : n // 2, :, :]
        between = _applied(maps[..., 0 : n - 1 : 2, :, :], before)
        pairs = torch.stack((before, between), -3).flatten(-4, -3)
        states = torch.cat((pairs, states[..., n // 2 :, :, :]), -3) if n % 2 else pairs
    return states


def _applied(maps: Tensor, S: Tensor) -> Tensor:
    M, B = maps.split((S.shape[-2], S.shape[-1]), -1)
    return M @ S + B


def _incoming(own: Tensor, axes: _Axes, *, reverse: bool = False) -> Tensor:
    """What the maps of all ranks before this one make of a zero state; of all behind it with ``reverse``.

    One all-gather for each dimension of the mesh, the innermost first: a row of ranks acts as one map on the next.
    """
    S = torch.zeros_like(own[..., own.shape[-2] :])
    before: list[Tensor] = []  # maps from the start of a row to this rank, innermost row first
    for i, axis in enumerate(reversed(axes)):
        maps = _all_gather(own, axis).movedim(0, -3)
        maps, rank = (maps.flip(-3), axis.size - 1 - axis.rank) if reverse else (maps, axis.rank)
        if rank > 0:
            before.append(_levels(maps[..., :rank, :, :])[-1].squeeze(-3))
        if i + 1 < len(axes):
            own = _levels(maps)[-1].squeeze(-3)
    for map in reversed(before):
        S = _applied(map, S)
    return S


# ---------------------------------------------------------------------------------------------------------------------
# Segments, and where the sequences lie in them
# ---------------------------------------------------------------------------------------------------------------------

# How many of (segment, row, value head) run at a time: the multiprocessors of an H100.
BLOCKS = 132
# Fewer tokens do not pay for a segment.
SHORTEST = 1024


def _segments(heads: int, T: int) -> int:
    """In how many segments of equal length a rank's ``T`` tokens run; ``heads`` counts those of all rows."""
    n = max(1, BLOCKS // max(1, heads))
    while n > 1 and n * SHORTEST > T:
        n //= 2
    return n


class _Gated(NamedTuple):
    """What a transition is made of, apart from the tokens."""

    A_log: Tensor | None
    dt_bias: Tensor | None
    l2norm: bool
    gate: bool
    sigmoid: bool
    negative: bool
    lower_bound: float | None


def _transition(tokens: Sequence[Tensor], cu_seqlens: Tensor | None, o: _Gated) -> tuple[Tensor, Tensor]:
    """``M`` and ``B`` of each sequence of ``k, v, g, beta``."""
    M, B = torch.ops.flashkda.chunk_kda_transition(*tokens, o.A_log, o.dt_bias, cu_seqlens, *o[2:])
    return M, B


def _where(mask: Tensor, states: Tensor) -> Tensor:
    """``states`` where the mask of their rows says so, else zero: whatever they hold elsewhere."""
    return torch.where(mask.view(-1, 1, 1, 1), states, 0)


# A layout cuts sequences where segments meet. Its *pieces* are what lies between two cuts, ends or starts of sequences:
# ``chunk_kda`` takes them as sequences of their own. What goes on from one segment to the next is at most one sequence:
# a *span*. A layout has ``spans`` of them side by side, one for packed sequences, ``B`` for dense rows.
#
#   maps              what each segment does to the state that enters it, ``M`` and ``B [spans * n, HV, K, .]``
#   message           what the rank does, from what its segments do ``[spans, HV, K, K + V]``
#   entering          the state that enters the first segment, from that of the ranks before ``[spans, HV, K, V]``
#   initial_states    of the pieces, from those that enter the segments
#   final_states      of the sequences ``[N, HV, K, V]``, from those of the pieces: zero where they do not end here
#
# and the gradients of these. ``own`` are the initial states of the sequences, K-first as all states in here, or None.


class _Dense:
    """``B`` rows that lie over all ranks."""

    def __init__(self, q: Tensor, segments: int, axes: _Axes) -> None:
        self.spans, T = q.shape[:2]
        self.n = segments
        self.first, self.last = _rank(axes) == 0, _rank(axes) == _size(axes) - 1
        self.cu_seqlens = None
        if segments > 1:  # of the rows behind each other
            self.cu_seqlens = torch.arange(self.spans * segments + 1, device=q.device) * T // segments

    def tokens(self, x: Tensor) -> Tensor:
        return x if self.cu_seqlens is None or self.spans == 1 else x.flatten(0, 1).unsqueeze(0)

    def maps(self, tokens: Sequence[Tensor], o: _Gated, own: Tensor | None) -> tuple[Tensor, Tensor]:
        return _transition(tokens, self.cu_seqlens, o)

    def message(self, map: Tensor, own: Tensor | None) -> Tensor:
        if own is None or not self.first:
            return map
        return torch.cat((map[..., : map.shape[-2]], _applied(map, own)), -1)

    def entering(self, S: Tensor, own: Tensor | None) -> Tensor:
        return S if own is None or not self.first else own

    def initial_states(self, S: Tensor, own: Tensor | None) -> Tensor:
        return S

    def final_states(self, states: Tensor) -> Tensor:
        states = self._rows(states)[:, -1].contiguous()
        return states if self.last else torch.zeros_like(states)

    def of_final_states(self, dS: Tensor) -> Tensor:
        if not self.last:
            return dS.new_zeros(self.spans * self.n, *dS.shape[1:])
        others = dS.new_zeros(self.spans, self.n - 1, *dS.shape[1:])
        return torch.cat((others, dS.unsqueeze(1)), 1).flatten(0, 1)

    def of_entering(self, dinitial: Tensor) -> Tensor:
        return dinitial

    def of_leaving(self, dfinal: Tensor, dS: Tensor) -> Tensor:
        return dfinal + dS

    def of_initial_states(self, dinitial: Tensor) -> Tensor:
        dS = self._rows(dinitial)[:, 0].contiguous()
        return dS if self.first else torch.zeros_like(dS)

    def _rows(self, states: Tensor) -> Tensor:
        return states.unflatten(0, (self.spans, self.n))


class _Packed:
    """Sequences in one row of all ranks' tokens. All of it is arithmetic on the device.

    *Bounds* are the rank's first token, where its segments meet, and the token behind its last.
    """

    spans = 1

    def __init__(self, q: Tensor, segments: int, cu_seqlens: Tensor, rank_offsets: Tensor | None, axes: _Axes) -> None:
        T, device, self.n = q.shape[1], q.device, segments
        if rank_offsets is None:
            offsets = torch.arange(_size(axes) + 1, device=device) * T
        else:
            offsets = rank_offsets.long().cummax(0).values
        rank, last_rank, N = _rank(axes), _size(axes) - 1, cu_seqlens.shape[0] - 1
        cu = torch.minimum(cu_seqlens.long().cummax(0).values, offsets[-1])
        low, high = offsets[rank], offsets[rank + 1]
        sequence_starts, sequence_ends = cu[:-1], cu[1:]

        def held(token: Tensor) -> Tensor:
            """Whether this rank holds the token; what lies past all ranks is the last one's."""
            return torch.searchsorted(offsets[1:].contiguous(), token, right=True).clamp(max=last_rank) == rank

        self.starts = held(sequence_starts)  # [N]: the sequence's first token is here (of an empty one, its place)
        self.ends = held(torch.maximum(sequence_ends - 1, sequence_starts))  # [N]: its last token is

        # What crosses each bound, [n + 1]: at the rank's own bounds only what has a token before it, elsewhere also
        # what starts there, which is as good as a state that comes through.
        here = torch.minimum(torch.maximum(cu, low), high)
        inside = torch.arange(segments + 1, device=device)
        bounds = torch.minimum(low + inside * T // segments, here[-1])
        owner = torch.searchsorted(cu, bounds, right=True) - 1
        first_token = cu[owner.clamp(min=0)]
        self.crosses = (owner >= 0) & (owner < N) & (first_token < bounds + (inside % segments > 0))
        self.owner = owner.clamp(0, N - 1)
        # [n]: a sequence goes on from this segment to the next; it came from the one before, too
        self.goes_on = self.crosses[1:]
        self.goes_through = self.crosses[:-1] & self.goes_on & (owner[:-1] == owner[1:])
        start = torch.where(self.goes_on, torch.maximum(first_token[1:], bounds[:-1]), bounds[1:])
        # The part of each segment that goes on, behind all that does not.
        self.parts = F.pad(torch.stack((start, bounds[1:]), 1).flatten() - low, (1, 0))

        # Pieces. Where a cut and a start of a sequence are the same token, the cut comes second: an empty piece. Cuts
        # at the end of all sequences have nothing but empty pieces around them, and the last has none behind it.
        here, cuts = here - low, bounds[1:-1] - low
        at = torch.arange(N + 1, device=device) + torch.searchsorted(cuts, here)
        cut_at = torch.arange(segments - 1, device=device) + torch.searchsorted(here, cuts, right=True)
        merged = torch.cat((here, cuts))
        self.cu_seqlens = merged.scatter(0, torch.cat((at, cut_at)), merged)
        self.first_piece, self.last_piece = at[:-1], at[1:] - 1
        pieces = N + segments - 1
        # [n]: the piece behind each bound but the last
        self.behind_bound = torch.cat((at[self.owner[:1]], cut_at.clamp(max=pieces - 1)))
        self.before_bound = torch.cat((cut_at, at[self.owner[-1:] + 1])) - 1  # [n]: the piece before the others

    def tokens(self, x: Tensor) -> Tensor:
        return x

    def maps(self, tokens: Sequence[Tensor], o: _Gated, own: Tensor | None) -> tuple[Tensor, Tensor]:
        M, B = (x[1::2] for x in _transition(tokens, self.parts, o))
        if own is not None:
            B = B + M @ _where(self.goes_on & ~self.goes_through, own[self.owner[1:]])
        # A sequence that starts in a segment leaves it as B, whatever came before.
        return _where(self.goes_through, M), _where(self.goes_on, B)

    def message(self, map: Tensor, own: Tensor | None) -> Tensor:
        return map

    def entering(self, S: Tensor, own: Tensor | None) -> Tensor:
        return S

    def initial_states(self, S: Tensor, own: Tensor | None) -> Tensor:
        states = self._pieces(S)
        if own is not None:
            states = states.index_copy(0, self.first_piece, _where(self.starts, own))
        return states.index_add(0, self.behind_bound, _where(self.crosses[:-1], S))

    def final_states(self, states: Tensor) -> Tensor:
        return _where(self.ends, states[self.last_piece])

    def of_final_states(self, dS: Tensor) -> Tensor:
        return self._pieces(dS).index_copy(0, self.last_piece, _where(self.ends, dS))

    def of_entering(self, dinitial: Tensor) -> Tensor:
        return _where(self.crosses[:-1], dinitial[self.behind_bound])

    def of_leaving(self, dfinal: Tensor, dS: Tensor) -> Tensor:
        return dfinal.index_add(0, self.before_bound, _where(self.goes_on, dS))

    def of_initial_states(self, dinitial: Tensor) -> Tensor:
        return _where(self.starts, dinitial[self.first_piece])

    def _pieces(self, states: Tensor) -> Tensor:
        return states.new_zeros(self.cu_seqlens.shape[0] - 1, *states.shape[1:])


_Layout = _Dense | _Packed


def _layout(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, rank_offsets: Tensor | None, axes: _Axes, batch_invariant: bool
) -> _Layout:
    # With batch_invariant, sequences are cut by ranks alone.
    segments = 1 if batch_invariant else _segments(q.shape[0] * v.shape[2], q.shape[1])
    if cu_seqlens is None:
        return _Dense(q, segments, axes)
    return _Packed(q, segments, cu_seqlens, rank_offsets, axes)


def _by_span(x: Tensor, layout: _Layout) -> Tensor:
    """``[spans * n, HV, ...]`` to ``[spans, HV, n, ...]``."""
    return x.unflatten(0, (layout.spans, layout.n)).transpose(1, 2)


def _by_segment(x: Tensor) -> Tensor:
    """The inverse of :func:`_by_span`."""
    return x.transpose(1, 2).flatten(0, 1)


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
        own = initial_state.mT if initial_state is not None and v_first else initial_state
        gated = _Gated(A_log, dt_bias, l2norm, gate, sigmoid, negative, lower_bound)
        M, B = layout.maps(tokens[1:], gated, own)
        levels = _levels(torch.cat((_by_span(M, layout), _by_span(B, layout)), -1))
        S = layout.entering(_incoming(layout.message(levels[-1].squeeze(-3), own), axes), own)
        initial = layout.initial_states(_by_segment(_states_before(levels, S)), own)
        initial = (initial.mT if v_first else initial).contiguous()
        options = (l2norm, gate, sigmoid, negative, lower_bound, v_first)
        o, final, _ = torch.ops.flashkda.chunk_kda(
            *tokens, A_log, dt_bias, initial, layout.cu_seqlens, scale, True, *options, 0, batch_invariant
        )
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, rank_offsets, initial, M)
        ctx.options, ctx.v_first, ctx.axes = (scale, *options, batch_invariant), v_first, axes
        return o.view(v.shape), layout.final_states(final)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *differentiable, cu_seqlens, rank_offsets, initial, M = ctx.saved_tensors
        q, v, gates = differentiable[0], differentiable[2], differentiable[5:]
        layout = _layout(q, v, cu_seqlens, rank_offsets, ctx.axes, ctx.options[-1])
        do, *tokens = (layout.tokens(x) for x in (do, *differentiable[:5]))
        inputs = (*tokens, *gates, initial, layout.cu_seqlens, *ctx.options)
        with torch.autocast(q.device.type, enabled=False):  # as forward
            dpieces = layout.of_final_states(dfinal)
            only_initial = [False] * 7 + [True]
            C = layout.of_entering(torch.ops.flashkda.chunk_kda_backward(do, dpieces, *inputs, only_initial)[7])
            C = C.mT if ctx.v_first else C
            # From the last segment to the first.
            levels = _levels(torch.cat((_by_span(M.mT, layout), _by_span(C, layout)), -1).flip(-3))
            leaving = _incoming(levels[-1].squeeze(-3), ctx.axes, reverse=True)
            dS = _by_segment(_states_before(levels, leaving).flip(-3))
            dpieces = layout.of_leaving(dpieces, dS.mT if ctx.v_first else dS)
            needed = [bool(n) for n in ctx.needs_input_grad[:8]]
            grads = torch.ops.flashkda.chunk_kda_backward(do, dpieces, *inputs, needed)
        *grads, dinitial = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        grads = [None if dx is None else dx.view(x.shape) for dx, x in zip(grads, differentiable, strict=True)]
        return (*grads, None if dinitial is None else layout.of_initial_states(dinitial), *[None] * 11)


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
