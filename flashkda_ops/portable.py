"""Kimi Delta Attention in chunk form, in batched matrix products: any device, any head size, forward and backward.

``chunks`` has what the tokens of a chunk are to each other, and why that is exact; here are the scans from chunk to
chunk, and the ops. Many short sequences share chunks, whose scans are in ``shared_chunks``. Nothing reads the value of
a tensor on the host, so that all of it can be captured in CUDA graphs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashkda_ops import shared_chunks
from flashkda_ops.chunks import (
    CHUNK,
    AlignedLayout,
    Chunks,
    DenseLayout,
    Inputs,
    Layout,
    activate,
    allocate,
    pair_gradients,
    prepare,
    runs,
    split,
    store,
    store_gradients,
    take,
)
from flashkda_ops.options import KdaOptions
from flashkda_ops.paged import on_rows, read_rows, safe_cu_seqlens, token_owner, valid_slots, write_rows
from flashkda_ops.shared_chunks import SharedLayout
from flashkda_ops.validation import state_dtype

__all__ = [
    "Gradients",
    "chunk_kda",
    "chunk_kda_at_offsets",
    "chunk_kda_backward",
    "chunk_kda_transition",
    "initial_state_gradient",
    "num_checkpoints",
    "recurrent_kda_paged",
]


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None


# ---------------------------------------------------------------------------------------------------------------------
# Where the tokens lie
# ---------------------------------------------------------------------------------------------------------------------


def _layout(
    q: Tensor, cu_seqlens: Tensor | None, *, batch_invariant: bool = False, interval: int = 0
) -> Layout | SharedLayout:
    """The layout that costs least by the shapes; with ``batch_invariant``, chunks begin where their sequence does and
    are of one length. States before every ``interval``-th token are those before a chunk."""
    B, T = q.shape[:2]
    shortest = min(CHUNK, _power_of_2(T))
    if cu_seqlens is None:
        return DenseLayout(B, T, math.gcd(CHUNK if batch_invariant else shortest, interval))
    if batch_invariant or 2 * CHUNK * (cu_seqlens.shape[0] - 1) < T:
        return AlignedLayout(cu_seqlens, T, math.gcd(CHUNK, interval))
    return SharedLayout(cu_seqlens, T, math.gcd(shortest, interval), state_dtype(q))


def _power_of_2(n: int) -> int:
    """The smallest that is not less than ``n``."""
    return 1 << max(0, n - 1).bit_length()


# ---------------------------------------------------------------------------------------------------------------------
# The scans of chunks that are one sequence's
# ---------------------------------------------------------------------------------------------------------------------


class _StateRows:
    """The running state of a scan, and the sequences' own rows ``[N, HV, K, V]``.

    Dense layouts carry ``[B * HV, K, V]`` for all sequences at once. Packed ones carry ``[HV, K, V]``, take over a
    sequence's row where it begins, and store into it after every chunk, so that the last one remains. Chunks of no
    sequence have a row of their own behind the others.
    """

    def __init__(self, layout: Layout, rows: Tensor, *, reverse: bool = False) -> None:
        self.shape = rows.shape
        if isinstance(layout, AlignedLayout):
            self.seq: Tensor | None = layout.seq
            self.begins = layout.last if reverse else layout.first
            self.rows = torch.cat((rows, torch.zeros_like(rows[:1])))
            self.state = torch.zeros_like(rows[0])
        else:
            self.seq = None
            self.state = rows.flatten(0, 1)

    def enter(self, c: int, out: Tensor) -> Tensor:
        """The state before chunk ``c``, in ``out``, where the scan may have left it already."""
        if self.seq is None:
            return out if out.data_ptr() == self.state.data_ptr() else out.copy_(self.state)
        row = self.rows.index_select(0, self.seq[c : c + 1])[0]
        return torch.where(self.begins[c], row, self.state, out=out)

    def leave(self, c: int, state: Tensor) -> None:
        self.state = state
        if self.seq is not None:
            self.rows.index_copy_(0, self.seq[c : c + 1], state.unsqueeze(0))

    def result(self) -> Tensor:
        """The states ``[N, HV, K, V]`` that the scan ends with: a view."""
        return self.state.view(self.shape) if self.seq is None else self.rows[:-1]


def _scan_forward(x: Chunks, AV: Tensor, rows: _StateRows, c0: int, entering: Tensor) -> Tensor:
    """Advance the state over the chunks ``x``, the first of them chunk ``c0`` of the call.

    Fills ``entering [n, M, K, V]`` with the state before each chunk and turns ``AV`` into ``U [n, M, C, V]``, which it
    returns.
    """
    states = [*entering.unbind(0), torch.empty_like(entering[0])]
    factors = zip(AV.unbind(0), (x.A @ x.Kd).unbind(0), x.gamma.unbind(0), x.Kr.mT.unbind(0), strict=True)
    for c, (U, AKd, gamma, Kr_t) in enumerate(factors):
        S = rows.enter(c0 + c, states[c])
        U.baddbmm_(AKd, S, alpha=-1)
        rows.leave(c0 + c, torch.mul(S, gamma, out=states[c + 1]).baddbmm_(Kr_t, U))
    return AV


def _scan_backward(x: Chunks, dO: Tensor, rows: _StateRows, c0: int) -> tuple[Tensor, Tensor]:
    """The forward scan reversed. Returns ``dW`` and the gradient of each chunk's leaving state."""
    n, M, _, K = x.k.shape
    dW, dleaving = (x.P @ x.A).mT @ dO, x.v.new_empty(n, M, K, x.v.shape[-1])
    reader, seed, Kd_t = x.A.mT @ x.Kr, x.Qd.mT @ dO, x.Kd.mT
    for c in reversed(range(n)):
        dS = rows.enter(c0 + c, dleaving[c])
        dW[c].baddbmm_(reader[c], dS)
        rows.leave(c0 + c, torch.addcmul(seed[c], dS, x.gamma[c]).baddbmm_(Kd_t[c], dW[c], alpha=-1))
    return dW, dleaving


def _forward(
    layout: Layout, x: Inputs, initial: Tensor, options: KdaOptions, *, entering: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, HV, V]`` and final states ``[N, HV, K, V]`` in the compute dtype, the latter maybe a view.

    ``entering [chunks, B * HV, K, V]`` is filled with the states before chunks where it is given.
    """
    HV, K, V = initial.shape[1:]
    o = allocate(layout, initial, HV, V)
    states = _StateRows(layout, initial)
    for c0, c1 in runs(layout, x.v, K):
        chunks = prepare(layout, activate(take(layout, x, c0, c1), options), options.scale, c0, c1)
        S = initial.new_empty(c1 - c0, layout.batch * HV, K, V) if entering is None else entering[c0:c1]
        U = _scan_forward(chunks, chunks.A @ chunks.v, states, c0, S)
        o_chunks = (chunks.Qd @ S).flatten(0, 1).baddbmm_(chunks.P.flatten(0, 1), U.flatten(0, 1)).view_as(U)
        store(layout, o_chunks, o, c0)
    return layout.finish(o), states.result()


def _run_backward(
    layout: Layout,
    taken: Inputs,
    do: Tensor,
    S: Tensor,
    dstates: _StateRows,
    options: KdaOptions,
    grads: Inputs,
    c0: int,
    c1: int,
) -> None:
    """The backward pass of a run of chunks: fills its rows of ``grads``, adds to those of ``A_log`` and ``dt_bias``."""
    activated = activate(taken, options)
    x = prepare(layout, activated, options.scale, c0, c1)
    dO = split(layout, do.to(x.v.dtype), c0, c1)
    W = x.v - x.Kd @ S
    U = x.A @ W
    dW, dleaving = _scan_backward(x, dO, dstates, c0)

    Y = x.T.mT @ (x.P.mT @ dO + x.Kr @ dleaving)
    dPN = torch.stack((dO @ U.mT, (dW @ U.mT).neg_()), 3)
    dbeta = (Y * (W - x.N @ U)).sum(-1, keepdim=True)
    dKr = U @ dleaving.mT
    up = torch.stack((dO @ S.mT, (dW @ S.mT).neg_()), 3).mul_(x.from_start.unsqueeze(3))  # of q, and of k from before
    k_down = x.to_end * dKr  # of k from behind
    pair_gradients(x, dPN, split(layout, activated.g, c0, c1), up, k_down)
    dq, k_up = up.unbind(3)
    dG = x.q * dq + x.k * (k_up - k_down)
    dG[:, :, -1] += (dKr * x.Kr).sum(-2) + (x.gamma * dleaving * S).sum(-1)
    dg = dG.flip(-2).cumsum(-2).flip(-2)
    # A token reads itself undecayed, which is nothing to the gate.
    diagonal = dPN[..., 0, :].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    chunks = (dq + diagonal * x.k, k_up + k_down + diagonal * x.q, dW, dg, dbeta)
    store_gradients(layout, taken, activated, options, chunks, grads, c0, c1)


# ---------------------------------------------------------------------------------------------------------------------
# The ops
# ---------------------------------------------------------------------------------------------------------------------


def _k_first(state: Tensor | None, x: Inputs, v_first: bool) -> Tensor | None:
    """A state argument as ``[N, HV, K, V]`` in the compute dtype, maybe the argument itself."""
    return None if state is None else (state.mT if v_first else state).to(state_dtype(x.q))


def _rows(state: Tensor | None, x: Inputs, cu_seqlens: Tensor | None) -> Tensor:
    """``state``, or zeros in its place."""
    if state is not None:
        return state
    N = x.q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.v.new_zeros(N, x.v.shape[2], x.q.shape[3], x.v.shape[3], dtype=state_dtype(x.q))


def _result(states: Tensor, v_first: bool, *, own: bool = False) -> Tensor:
    """K-first states in the caller's layout, in memory of their own, which callers may write to.

    ``own``: these states are in such memory already.
    """
    if own and not v_first:
        return states
    return (states.mT if v_first else states).clone(memory_format=torch.contiguous_format)


def num_checkpoints(T: int, sequences: int, interval: int, *, packed: bool) -> int:
    """Rows of intermediate states a call returns: per sequence when dense, the most there can be when packed."""
    if packed:
        return (T + sequences * (interval - 1)) // interval
    return -(-T // interval)


def _checkpoints(layout: Layout, entering: Tensor, every: int) -> Tensor:
    """States that enter every ``every``-th chunk of a sequence, ``[B, NT, HV, ...]``; rows of no sequence are zero."""
    _, M, K, V = entering.shape
    if isinstance(layout, DenseLayout):
        return entering[::every].unflatten(1, (layout.batch, M // layout.batch)).transpose(0, 1)
    NT = num_checkpoints(layout.T, layout.sequences, layout.chunk * every, packed=True)
    kept = layout.used & (layout.position % every == 0)
    row = torch.where(kept, kept.cumsum(0) - 1, NT)
    return entering.new_zeros(NT + 1, M, K, V).index_copy_(0, row, entering)[None, :NT]


def chunk_kda(
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
    output_final_state: bool = True,
    checkpoint_interval: int = 0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, and if asked for final state and intermediate states, of ``flashkda::chunk_kda``."""
    x = Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    initial = _k_first(initial_state, x, state_v_first)
    final: Tensor | None
    states: Tensor | None = None
    if not q.numel():
        final = _result(_rows(initial, x, cu_seqlens), state_v_first)
        if checkpoint_interval:
            NT = num_checkpoints(q.shape[1], final.shape[0], checkpoint_interval, packed=cu_seqlens is not None)
            states = final.new_zeros(q.shape[0], NT, *final.shape[1:])
        return v.new_zeros(v.shape), final, states
    layout = _layout(q, cu_seqlens, batch_invariant=batch_invariant, interval=checkpoint_interval)
    if isinstance(layout, SharedLayout):
        if checkpoint_interval:
            most = num_checkpoints(layout.T, layout.sequences, checkpoint_interval, packed=True)
            o, final, states = shared_chunks.forward_with_checkpoints(
                layout, x, _rows(initial, x, cu_seqlens), options, checkpoint_interval, most
            )
            states = _result(states.unsqueeze(0), state_v_first)
        else:
            o, final = shared_chunks.forward(layout, x, initial, options, final=output_final_state)
        return o.to(v.dtype), None if final is None else _result(final, state_v_first, own=True), states
    initial, entering = _rows(initial, x, cu_seqlens), None
    if checkpoint_interval:
        entering = initial.new_empty(layout.chunks, layout.batch * v.shape[2], *initial.shape[2:])
    o, final = _forward(layout, x, initial, options, entering=entering)
    if entering is not None:
        states = _result(_checkpoints(layout, entering, checkpoint_interval // layout.chunk), state_v_first)
    return o.to(v.dtype), _result(final, state_v_first) if output_final_state else None, states


def chunk_kda_at_offsets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    offsets: Tensor,
    options: KdaOptions,
    *,
    state_v_first: bool,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`chunk_kda`, and the states after ``offsets [N, C]`` tokens of each sequence, ``[N, C, HV, ...]``.

    Offsets are in any order; those outside of the sequence are as its start or end.
    """
    B, T = q.shape[:2]
    cu = torch.arange(0, B * T + 1, T, device=q.device) if cu_seqlens is None else safe_cu_seqlens(cu_seqlens, T)
    q, k, v, g, beta = (x.reshape(1, B * T, *x.shape[2:]) for x in (q, k, v, g, beta))
    x = Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    initial = _rows(_k_first(initial_state, x, state_v_first), x, cu)
    starts, lengths = cu[:-1, None], cu.diff().unsqueeze(1)
    cuts, order = (starts + torch.minimum(offsets.long().clamp(min=0), lengths)).sort(1)
    bounds = torch.cat((starts, cuts, starts + lengths), 1)  # [N, C + 2]
    layout = _layout(q, bounds.flatten()[1:], batch_invariant=batch_invariant)
    if isinstance(layout, SharedLayout):
        layout = SharedLayout(cu, B * T, layout.chunk, layout.dtype)
        o, after = shared_chunks.forward_at_offsets(layout, x, initial, options, bounds)
    else:
        o, after = _forward_in_pieces(x, initial, options, bounds)
    after = after.mT if state_v_first else after
    states = torch.empty_like(after[:, :-1]).scatter_(1, order[..., None, None, None].expand_as(after[:, :-1]), after)
    return o.to(v.dtype).view(B, T, *o.shape[2:]), after[:, -1].contiguous(), states


def _forward_in_pieces(x: Inputs, initial: Tensor, options: KdaOptions, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the states at all of ``bounds [N, C]`` but the first of each sequence, ``[N, C - 1, HV, K, V]``.

    A sequence is cut into pieces there: no chunk spans two of them, and the state goes on from one to the next.
    """
    N, pieces = bounds.shape[0], bounds.shape[1] - 1
    layout = AlignedLayout(torch.cat((bounds[:1, 0], bounds[:, 1:].flatten())), x.q.shape[1], CHUNK)
    # A chunk loads its piece's row where a sequence begins, and there alone. So every piece that may be the first one
    # with tokens has the sequence's initial state in its row.
    begins_sequence = (bounds[:, :-1] == bounds[:, :1]).flatten()
    layout.first &= begins_sequence[layout.seq.clamp(max=N * pieces - 1)]
    o, after = _forward(layout, x, initial.repeat_interleave(pieces, 0), options)
    # An empty piece leaves what the last one with tokens left, or the initial state, which its own row still holds.
    piece = torch.arange(N * pieces, device=bounds.device).view(N, pieces)
    latest = torch.where(bounds.diff() > 0, piece, -1).cummax(1).values
    after = after.index_select(0, torch.where(latest >= 0, latest, piece).flatten())
    return o, after.unflatten(0, (N, pieces))


def chunk_kda_transition(
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
) -> tuple[Tensor, Tensor]:
    """``M`` and ``B`` of ``flashkda::chunk_kda_transition``.

    The columns of a state advance apart from each other. So the scan takes ``V + K`` of them: those of ``v`` from zero,
    which become ``B``, and beside them, from the identity and with no values of their own, the columns of ``M``.
    """
    x = Inputs(k, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)  # no output is computed: any query will do
    (HV, V), K = v.shape[2:], k.shape[-1]
    identity = torch.eye(K, V + K, dtype=state_dtype(k), device=k.device).roll(V, 1)
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = identity.expand(N, HV, -1, -1)
    if k.numel():
        layout = _layout(k, cu_seqlens)
        if isinstance(layout, SharedLayout):
            padded = x._replace(v=F.pad(v, (0, K)))
            rows = shared_chunks.final_states(layout, padded, rows, options)
        else:
            states = _StateRows(layout, rows)
            for c0, c1 in runs(layout, v, K):
                chunks = prepare(layout, activate(take(layout, x, c0, c1), options), options.scale, c0, c1)
                entering = identity.new_empty(c1 - c0, layout.batch * HV, K, V + K)
                _scan_forward(chunks, F.pad(chunks.A @ chunks.v, (0, K)), states, c0, entering)
            rows = states.result()
    B, M = (_result(t, state_v_first) for t in rows.split((V, K), -1))
    return M, B


def chunk_kda_backward(
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
    batch_invariant: bool = False,
) -> Gradients:
    """Gradients of :func:`chunk_kda` from the cotangents of its output and final state, either absent.

    The formulas are those of ``docs/backward.md``. The states between chunks are recomputed and kept, everything else
    is recomputed where it is used.
    """
    x = Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    initial, dht = (_k_first(t, x, state_v_first) for t in (initial_state, dht))
    dA_log, ddt_bias = (None if t is None else t.new_zeros(t.shape, dtype=state_dtype(q)) for t in (A_log, dt_bias))
    if not q.numel():
        dq, dk, dv, dg, dbeta = (t.new_zeros(t.shape) for t in (q, k, v, g, beta))
        dinitial = None if initial is None else _rows(dht, x, cu_seqlens)
    else:
        layout = _layout(q, cu_seqlens, batch_invariant=batch_invariant)
        dq, dk, dv, dg, dbeta = (allocate(layout, t, *t.shape[2:]) for t in (q, k, v, g, beta))
        by_head = None if ddt_bias is None else ddt_bias.view(v.shape[2], q.shape[-1])
        grads = Inputs(dq, dk, dv, dg, dbeta.unsqueeze(-1), dA_log, by_head)
        if isinstance(layout, SharedLayout):
            dinitial = shared_chunks.backward(
                layout, x, do, dht, initial, options, grads, initial_gradient=initial is not None
            )
        else:
            dstates = _StateRows(layout, _rows(dht, x, cu_seqlens), reverse=True)
            first = _rows(initial, x, cu_seqlens)
            entering = first.new_empty(layout.chunks, layout.batch * v.shape[2], *first.shape[2:])
            _forward(layout, x, first, options, entering=entering)
            for c0, c1 in reversed(runs(layout, v, q.shape[-1])):
                taken = take(layout, x, c0, c1)
                dtaken = torch.zeros_like(taken.v) if do is None else layout.take(do, c0, c1)
                _run_backward(layout, taken, dtaken, entering[c0:c1], dstates, options, grads, c0, c1)
            dinitial = None if initial is None else dstates.result()
        dq, dk, dv, dg, dbeta = (layout.finish(t) for t in (dq, dk, dv, dg, dbeta))
    return Gradients(
        dq, dk, dv, dg, dbeta,
        None if A_log is None or dA_log is None else dA_log.to(A_log.dtype),
        None if dt_bias is None or ddt_bias is None else ddt_bias.to(dt_bias.dtype),
        None if dinitial is None else _result(dinitial, state_v_first),
    )  # fmt: skip


def initial_state_gradient(
    do: Tensor | None,
    dht: Tensor | None,
    q: Tensor,
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
    batch_invariant: bool = False,
) -> Tensor:
    """Of :func:`chunk_kda_backward`, the gradient of the initial state alone: it needs no state of the forward pass."""
    x = Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    dht = _k_first(dht, x, state_v_first)
    if not q.numel():
        return _result(_rows(dht, x, cu_seqlens), state_v_first)
    layout = _layout(q, cu_seqlens, batch_invariant=batch_invariant)
    if isinstance(layout, SharedLayout):
        dinitial = shared_chunks.backward(layout, x, do, dht, None, options, None, initial_gradient=True)
        assert dinitial is not None
        return _result(dinitial, state_v_first, own=True)
    dstates = _StateRows(layout, _rows(dht, x, cu_seqlens), reverse=True)
    for c0, c1 in reversed(runs(layout, v, q.shape[-1])):
        taken = take(layout, x, c0, c1)
        dtaken = torch.zeros_like(taken.v) if do is None else layout.take(do, c0, c1)
        chunks = prepare(layout, activate(taken, options), options.scale, c0, c1)
        _scan_backward(chunks, split(layout, dtaken.to(chunks.v.dtype), c0, c1), dstates, c0)
    return _result(dstates.result(), state_v_first)


def recurrent_kda_paged(
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
) -> Tensor:
    """Output of ``flashkda::recurrent_kda_paged``; the pool's rows are advanced in place.

    With one slot a sequence this is the chunk form, in chunks no longer than a dense sequence: one token makes it the
    recurrence itself. With a slot for each token it is the recurrence, and every state is written.
    """
    B, T = q.shape[:2]
    if state_indices.dim() == 1:

        def forward(initial: Tensor) -> tuple[Tensor, Tensor]:
            o, final, _ = chunk_kda(
                q, k, v, g, beta, A_log, dt_bias, initial, cu_seqlens, options, state_v_first=state_v_first
            )
            assert final is not None
            return o, final

        return on_rows(forward, state_pool, state_indices, cu_seqlens, None, T, state_dtype(q))
    N, width = state_indices.shape
    slots = state_indices.long()
    if num_accepted_tokens is None:
        start, valid = slots[:, 0], slots.new_ones(N, dtype=torch.bool)
    else:
        column = num_accepted_tokens.long() - 1
        valid = (column >= 0) & (column < width)
        start = slots.gather(1, torch.where(valid, column, 0).unsqueeze(1)).squeeze(1)
    valid = valid & valid_slots(start, state_pool)
    cu = torch.arange(0, B * T + 1, T, device=q.device) if cu_seqlens is None else safe_cu_seqlens(cu_seqlens, T)
    # Sequences may have more tokens than slots, however little sense that makes. Where that may be many, they are not
    # taken one after the other.
    first = T if T <= 2 * CHUNK else width
    q, k, v, g, beta = (t.reshape(1, B * T, *t.shape[2:]) for t in (q, k, v, g, beta))
    x = Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    initial = read_rows(state_pool, start, valid, state_dtype(q))
    steps = _by_token(x, initial.mT if state_v_first else initial, cu, first, options, state_pool.dtype)
    slot = slots[steps.seq, steps.t.clamp(max=width - 1)]
    written = steps.exists & (steps.t < width) & valid[steps.seq] & valid_slots(slot, state_pool)
    write_rows(state_pool, slot, written, steps.states.mT if state_v_first else steps.states)
    o, owner = steps.o, token_owner(cu, B * T).clamp(max=N - 1)
    if first < T:
        o = torch.where(_position(cu, owner) < first, o, _rest(x, steps.final, cu, first, options))
    o = o.unflatten(0, (B, T))
    return torch.where(valid[owner].view(B, T, 1, 1), o, 0).to(v.dtype)


class _Steps(NamedTuple):
    o: Tensor  # [T, HV, V]: zero for tokens that were not reached
    seq: Tensor  # [steps]: the sequence of each step of the recurrence
    t: Tensor  # [steps]: and the place of its token there
    exists: Tensor  # [steps]: whether there is one
    states: Tensor  # [steps, HV, K, V]: the states after it
    final: Tensor  # [N, HV, K, V]


def _by_token(x: Inputs, initial: Tensor, cu: Tensor, most: int, options: KdaOptions, dtype: torch.dtype) -> _Steps:
    """The recurrence over the first tokens of each sequence in a row ``[1, T, ...]``, ``most`` or as many as there are.

    The states after each are in ``dtype``, and the next token starts from there.
    """
    (HV, V), T, N = x.v.shape[2:], x.v.shape[1], initial.shape[0]
    layout = DenseLayout(1, T, 1)
    c = prepare(layout, activate(take(layout, x, 0, T), options), options.scale, 0, T)  # [T, HV, 1, .]
    # The longest first: at most T / (t + 1) sequences have a token t.
    lengths, order = cu.diff().sort(descending=True, stable=True)
    counts = [min(N, T // (t + 1)) for t in range(most)]
    ranks = torch.arange(N, device=cu.device)
    rank, t = torch.cat([ranks[:n] for n in counts]), torch.cat([ranks.new_full((n,), t) for t, n in enumerate(counts)])
    seq, exists = order[rank], t < lengths[rank]
    token = torch.where(exists, cu[seq] + t, 0)
    states, o = initial.new_empty(len(rank), HV, *initial.shape[2:], dtype=dtype), c.v.new_empty(len(rank), HV, 1, V)
    factors = (x.index_select(0, token) for x in (c.A @ c.v, c.A @ c.Kd, c.gamma, c.Kr.mT, c.Qd, c.P))
    steps = zip(counts, exists.split(counts), *(f.split(counts) for f in (*factors, o, states)), strict=True)
    S = initial.index_select(0, order)
    for n, is_here, *step, after in steps:
        U, AKd, gamma, Kr_t, Qd, P, out = (x.flatten(0, 1) for x in step)
        before = S[:n].flatten(0, 1)
        U.baddbmm_(AKd, before, alpha=-1)
        torch.bmm(Qd, before, out=out).baddbmm_(P, U)
        after.copy_(torch.mul(before, gamma).baddbmm_(Kr_t, U).view_as(after))
        S[:n] = torch.where(is_here.view(-1, 1, 1, 1), after, S[:n])
    rows = o.new_zeros(T + 1, HV, V).index_copy_(0, torch.where(exists, token, T), o.squeeze(2))
    return _Steps(rows[:-1], seq, t, exists, states, torch.empty_like(S).index_copy_(0, order, S))


def _position(cu: Tensor, owner: Tensor) -> Tensor:
    """Where each token is in its sequence ``[T, 1, 1]``."""
    return (torch.arange(owner.shape[0], device=cu.device) - cu[owner]).view(-1, 1, 1)


def _rest(x: Inputs, states: Tensor, cu: Tensor, first: int, options: KdaOptions) -> Tensor:
    """Outputs ``[T, HV, V]`` of the tokens that come after the ``first`` ones of their sequence, from the states before
    them; those of the others are not to be used."""
    cut = torch.minimum(cu[:-1] + first, cu[1:])
    bounds = torch.cat((torch.stack((cu[:-1], cut), 1).flatten(), cu[-1:]))
    initial = torch.stack((torch.zeros_like(states), states), 1).flatten(0, 1)
    q, k, v, g, beta = x[:5]
    o, _, _ = chunk_kda(
        q, k, v.to(states.dtype), g, beta.squeeze(-1), x.A_log, x.dt_bias, initial, bounds, options,
        state_v_first=False, output_final_state=False,
    )  # fmt: skip
    return o[0]
