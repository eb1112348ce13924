"""Both directions of the chunk form where sequences share chunks: many short ones cost what one of all tokens costs.

The chunks are those of the row of all tokens, so there are as many as for one sequence however many there are. A chunk
holds whole sequences, the end of one that came in from the chunk before, and the start of one that goes on to the
next, or nothing but the middle of one. The parts of sequences are kept apart by selecting, never by multiplying with
zero: what is not finite stays in its sequence. At the midpoint of any block of the tree over a chunk at most one
sequence lies across (``chunks.Crossing``), so one product serves all blocks of a level, its operands and its result
selected to that one sequence.

Only a sequence that goes through all of a chunk makes the state it leaves depend on the state that comes in. What all
others leave, and the gradients of what came in, is computed for all chunks at once, and the scan selects between the
two. Sequences with an initial state of their own, and final states where they are asked for, are products with a state
a sequence: ``_Parts`` forms these for the parts of sequences that begin, or end, within a run of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flashkda_ops.chunks import (
    Chunks,
    Crossing,
    Crossings,
    DenseLayout,
    Inputs,
    activate,
    allocate,
    as_bits,
    halves,
    pair_gradients,
    prepare,
    product,
    product_t,
    running_sums,
    runs,
    select,
    split,
    store,
    store_gradients,
    take,
)
from flashkda_ops.options import KdaOptions
from flashkda_ops.paged import safe_cu_seqlens
from flashkda_ops.validation import state_dtype

__all__ = ["SharedLayout", "backward", "forward"]


# ---------------------------------------------------------------------------------------------------------------------
# Where sequences lie in chunks
# ---------------------------------------------------------------------------------------------------------------------


class SharedLayout(DenseLayout):
    """``[1, T, ...]`` with ``cu_seqlens``, cut in chunks wherever sequences begin.

    Tokens of no sequence, and the rows behind the last token, count as sequences here, whose results are zeroed.
    """

    def __init__(self, cu_seqlens: Tensor, T: int, chunk: int, dtype: torch.dtype) -> None:
        super().__init__(1, T, chunk)
        self.dtype = dtype
        N = self.sequences = cu_seqlens.shape[0] - 1
        cu = safe_cu_seqlens(cu_seqlens, T)
        rows = self.chunks * chunk
        bounds = torch.cat((cu.new_zeros(1), cu, cu.new_full((1,), rows)))
        self.row = torch.arange(rows, device=cu.device)
        owner = torch.searchsorted(bounds[1:].contiguous(), self.row, right=True)
        self.seq = owner - 1
        self.valid = (self.seq >= 0) & (self.seq < N)
        self.start, self.end = bounds[owner], bounds[owner + 1]
        self.chunk_start = self.row - self.row % chunk

    def is_token(self, c0: int, c1: int) -> Tensor:
        return self.valid[c0 * self.chunk : min(self.T, c1 * self.chunk)]

    def finish(self, x: Tensor) -> Tensor:
        return torch.where(self.valid[: self.T].view(-1, *[1] * (x.dim() - 2)), x, 0)

    def shares(self, c0: int, c1: int) -> _Shares:
        rows, C = slice(c0 * self.chunk, c1 * self.chunk), self.chunk
        row, seq, start, end, chunk_start = (
            x[rows].view(-1, 1, C, 1) for x in (self.row, self.seq, self.start, self.end, self.chunk_start)
        )
        bits = partial(as_bits, dtype=self.dtype)
        crossings, size = {}, 2
        while size <= C:
            first, second = halves(seq, size)
            crossings[size] = Crossing(bits(first == second[..., :1, :]), bits(second == first[..., -1:, :]))
            size *= 2
        comes_in, goes_on = start < chunk_start, end > chunk_start + C
        through = comes_in & goes_on
        part_of_one = self.valid[rows].view(-1, 1, C, 1) & ~through
        seq, last = seq.clamp(0, self.sequences - 1), torch.minimum(end, chunk_start + C) - 1
        ends, begins = (comes_in & part_of_one)[:, 0, 0, 0], (goes_on & part_of_one)[:, 0, -1, 0]
        return _Shares(
            crossings,
            comes_in=bits(comes_in),
            goes_on=bits(goes_on),
            last=bits(row == last),
            through=through[:, 0, 0, 0],
            ends=bits(ends),
            ending_seq=seq[:, 0, 0, 0],
            ending_row=(last - chunk_start)[:, 0, 0, 0],
            begins=bits(begins),
            beginning_seq=seq[:, 0, -1, 0],
        )

    def beginnings(self, c0: int, c1: int) -> _Parts:
        """The parts of sequences that begin in these chunks."""
        length = torch.minimum(self.end, self.chunk_start + self.chunk) - self.row
        return self._parts(c0, c1, self.row, torch.where(self.row == self.start, length, 0))

    def endings(self, c0: int, c1: int) -> _Parts:
        """The parts of sequences that end in these chunks."""
        first = torch.maximum(self.start, self.chunk_start)
        return self._parts(c0, c1, first, torch.where(self.row == self.end - 1, self.end - first, 0))

    def _parts(self, c0: int, c1: int, first: Tensor, length: Tensor) -> _Parts:
        rows = slice(c0 * self.chunk, c1 * self.chunk)
        lengths, order = torch.where(self.valid[rows], length[rows], 0).sort(descending=True, stable=True)
        order = order[: self.sequences] + c0 * self.chunk
        whole = (self.start[order] >= self.chunk_start[order]) & (
            self.end[order] <= self.chunk_start[order] + self.chunk
        )
        first = first[order] - c0 * self.chunk
        seq = self.seq[order].clamp(0, self.sequences - 1)
        lengths = lengths[: self.sequences]
        whole = as_bits(whole & (lengths > 0), self.dtype)
        return _Parts(first, lengths, seq, whole, (c1 - c0) * self.chunk, self.chunk)


class _Shares(NamedTuple):
    """How the sequences lie in a run of ``n`` chunks. Masks are bits for ``select`` but for one."""

    crossings: Crossings
    comes_in: Tensor  # [n, 1, C, 1]: tokens of the sequence that came in from the chunk before
    goes_on: Tensor  # tokens of the sequence that goes on to the next
    last: Tensor  # the last token of each part
    through: Tensor  # [n]: whether one sequence goes through all of the chunk, as bool
    ends: Tensor  # [n]: whether a sequence that came in ends in it
    ending_seq: Tensor  # [n]: which one does
    ending_row: Tensor  # [n]: its last row
    begins: Tensor  # [n]: whether a sequence that goes on begins in it
    beginning_seq: Tensor  # [n]: which one does

    def decay_to_end(self, x: Chunks) -> Tensor:
        """How the state that comes in has decayed where its sequence ends ``[n, M, K, 1]``."""
        n = torch.arange(self.ends.shape[0], device=self.ends.device)
        return x.from_start[n, :, self.ending_row].unsqueeze(-1)

    def at_end(self, values: Tensor, x: Tensor) -> Tensor:
        """``values [n, M, K]`` where the sequence that came in ends, in ``[n, M, C, K]`` as ``x``, else zero."""
        row = torch.arange(x.shape[2], device=x.device).view(-1, 1)
        at = as_bits(row == self.ending_row.view(-1, 1, 1, 1), x.dtype)
        return select(self.ends.view(-1, 1, 1, 1) & at, values.unsqueeze(2))

    def add_ended(self, x: Chunks, S: Tensor, finals: Tensor) -> None:
        """Add to final states what is left of states ``S [n, M, K, V]`` that came in."""
        finals.index_add_(0, self.ending_seq, _where(self.ends, self.decay_to_end(x) * S))

    def add_begun(self, x: Chunks, dS: Tensor, dinitial: Tensor) -> None:
        """Add to the gradients of initial states what is left of those of the states that go on."""
        dinitial.index_add_(0, self.beginning_seq, _where(self.begins, x.gamma * dS))


def _where(mask: Tensor, x: Tensor) -> Tensor:
    """The marked ones of ``x``; zero, whatever they are, in place of the others."""
    return select(mask.view(-1, *[1] * (x.dim() - 1)), x)


class _Parts:
    """Parts of sequences that lie in one chunk each, at most one a sequence, as many as there may be.

    The longest come first: at most ``rows / (t + 1)`` are longer than ``t`` tokens. So a few products of shapes that
    follow from the number of rows serve parts of all lengths, and do little work for nothing. Those that there are not
    have a length of 0.
    """

    _STEPS = ((0, 4), (4, 12), (12, 32))  # of a part's tokens

    def __init__(self, first: Tensor, length: Tensor, seq: Tensor, whole: Tensor, rows: int, chunk: int) -> None:
        self._exists = length > 0
        self.whole = whole  # whether the part is all of its sequence, in bits
        self.seq = torch.where(self._exists, seq, seq[0])
        self._last = first + (length - 1).clamp(min=0)
        self._rows, self._chunk = rows, chunk
        self._steps = []  # how many parts, and the rows of their tokens; the row behind all others is for none
        for start, end in self._STEPS:
            if start < chunk:
                count = min(seq.shape[0], rows // (start + 1))
                token = torch.arange(start, min(end, chunk), device=seq.device)
                self._steps.append(
                    (count, torch.where(token < length[:count, None], first[:count, None] + token, rows))
                )

    def states(self, states: Tensor) -> Tensor:
        """Of ``[N, ...]`` those of the parts' sequences, in memory of their own."""
        return states.index_select(0, self.seq)

    def store_states(self, values: Tensor, out: Tensor) -> None:
        """``[parts, ...]`` to the rows of their sequences in ``out [N, ...]``; overwrites the first of them."""
        # Those that there are not write what the first one does: if there is none at all, what is there already.
        torch.where(self._exists[:1, None, None, None], values[:1], out.index_select(0, self.seq[:1]), out=values[:1])
        source = torch.where(self._exists, torch.arange(values.shape[0], device=values.device), 0)
        out.index_copy_(0, self.seq, values.index_select(0, source))

    def decay(self, x: Chunks) -> Tensor:
        """The decay over each part ``[parts, M, K]``."""
        return x.from_start[self._last // self._chunk, :, self._last % self._chunk]

    def at_last(self, values: Tensor) -> Tensor:
        """``values [parts, M, K]`` at the last tokens of the parts ``[n, M, C, K]``, zero at all others."""
        rows = values.new_zeros(self._rows + 1, *values.shape[1:])
        rows.index_copy_(0, torch.where(self._exists, self._last, self._rows), values)
        return self._by_chunk(rows)

    def read(self, states: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens ``[n, M, C, D]`` times the state ``[parts, M, D, E]`` of their part; zero for tokens of no part."""
        x = self._by_row(tokens)
        y = x.new_zeros(*x.shape[:-1], states.shape[-1])
        for count, rows in self._steps:
            read = self._tokens(x, rows).flatten(2, 3) @ states[:count]
            read = read.unflatten(2, (-1, len(tokens))).transpose(1, 2).flatten(0, 1)
            y.index_copy_(0, rows.flatten(), read)
        return tuple(self._by_chunk(t) for t in y.unbind(2))

    def add_outer(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        """Add to ``out [parts, M, D, E]`` the outer products of the tokens ``[n, M, C, D]`` and ``[n, M, C, E]``."""
        x, y = self._by_row((x,)), self._by_row((y,))
        for count, rows in self._steps:
            u, w = (self._tokens(t, rows).flatten(2, 3).flatten(0, 1) for t in (x, y))
            out[:count].flatten(0, 1).baddbmm_(u.mT, w)
        return out

    def _by_row(self, tokens: Sequence[Tensor]) -> Tensor:
        """``r`` tensors ``[n, M, C, D]`` as ``[rows + 1, M, r, D]``, of which the last row is zero."""
        _, M, _, D = tokens[0].shape
        rows = tokens[0].new_zeros(self._rows + 1, M, len(tokens), D)
        for x, out in zip(tokens, rows[:-1].unflatten(0, (-1, self._chunk)).unbind(3), strict=True):
            out.copy_(x.transpose(1, 2))
        return rows

    def _tokens(self, x: Tensor, rows: Tensor) -> Tensor:
        """``[rows + 1, M, r, D]`` to ``[count, M, tokens, r, D]``."""
        return x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)

    def _by_chunk(self, rows: Tensor) -> Tensor:
        return rows[:-1].unflatten(0, (-1, self._chunk)).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The scan of either direction
# ---------------------------------------------------------------------------------------------------------------------


class _Scanned(NamedTuple):
    states: Tensor  # [n, M, K, V]: what each chunk is given
    reads: Tensor  # [n, M, C, V]: what its tokens read of it
    last: Tensor  # [M, K, V]: what is given on


def _scan(
    own: Tensor, gamma: Tensor, reader: Tensor, writer: Tensor, through: Tensor, state: Tensor, *, reverse: bool = False
) -> _Scanned:
    """Give a state from chunk to chunk. Where one sequence goes through all of a chunk it gives on
    ``own + gamma * state - writer.mT @ (reader @ state)``, elsewhere ``own [n, M, K, V]`` alone."""
    n, M, C, _ = reader.shape
    states, reads = torch.empty_like(own), own.new_empty(n, M, C, own.shape[-1])
    factors = list(zip(*(x.unbind(0) for x in (reads, own, gamma, reader, writer.mT, through)), strict=True))
    given = [*states.unbind(0), torch.empty_like(state)]
    if reverse:
        factors, given = factors[::-1], [*given[-2::-1], given[-1]]
    given[0].copy_(state)
    for (read, own_c, gamma_c, reader_c, writer_t, through_c), before, after in zip(
        factors, given, given[1:], strict=False
    ):
        torch.bmm(reader_c, before, out=read)
        torch.addcmul(own_c, before, gamma_c, out=after).baddbmm_(writer_t, read, alpha=-1)
        torch.where(through_c, after, own_c, out=after)
    return _Scanned(states, reads, given[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    o: Tensor | None  # [1, T, HV, V], in the compute dtype
    final: Tensor | None  # [N, HV, K, V]
    entering: Tensor | None  # [chunks, HV, K, V]: the states between chunks


def _runs(layout: SharedLayout, x: Inputs, *, states: bool) -> list[tuple[int, int]]:
    """Runs of chunks, so short that the states of the sequences in them take no more than 16 MiB on a CPU."""
    HV, V, K = *x.v.shape[2:], x.k.shape[-1]
    step = max(end - start for start, end in runs(layout, x.v, K))
    if states:
        elements = HV * K * V
        step = min(step, max(1, (1 << 22 if x.v.device.type == "cpu" else 1 << 26) // (elements * layout.chunk)))
    return [(c, min(c + step, layout.chunks)) for c in range(0, layout.chunks, step)]


def _decayed(parts: _Parts, x: Chunks, states: Tensor | None, V: int) -> Tensor:
    """Of parts that are all of their sequence, its state decayed over it; zero for the others."""
    decay = _where(parts.whole, parts.decay(x)).unsqueeze(-1)
    if states is None:
        return decay.new_zeros(*decay.shape[:3], V)
    return parts.states(states).mul_(decay)


def forward(
    layout: SharedLayout,
    x: Inputs,
    initial: Tensor | None,
    options: KdaOptions,
    *,
    output: bool = True,
    final: bool = False,
    entering: bool = False,
) -> Forward:
    """What is asked for, from the initial states ``[N, HV, K, V]`` in the compute dtype, zero where there are none."""
    HV, V, K = *x.v.shape[2:], x.k.shape[-1]
    state = x.v.new_zeros(HV, K, V, dtype=state_dtype(x.v))
    o = allocate(layout, state, HV, V) if output else None
    states = state.new_empty(layout.chunks, HV, K, V) if entering else None
    finals = _of_sequences(layout, state, initial) if final else None
    for c0, c1 in _runs(layout, x, states=final or initial is not None):
        shares = layout.shares(c0, c1)
        c = prepare(layout, activate(take(layout, x, c0, c1), options), options.scale, c0, c1, shares.crossings)
        W, o_initial = c.v, None
        if initial is not None:
            beginnings = layout.beginnings(c0, c1)
            read, o_initial = beginnings.read(beginnings.states(initial), c.Kd, c.Qd)
            W = W - read
        U = product(c.T, c.beta * W, shares.crossings)
        TKd = select(shares.comes_in, c.T @ select(shares.comes_in, c.beta * c.Kd))
        leaving = select(shares.goes_on, c.Kr).mT @ select(shares.goes_on, U)
        if initial is not None:
            leaving += _where(shares.begins, c.gamma * initial.index_select(0, shares.beginning_seq))
        S, read, state = _scan(leaving, c.gamma, TKd, c.Kr, shares.through, state)
        U -= select(shares.comes_in, read)
        if states is not None:
            states[c0:c1] = S
        if o is not None:
            o_chunks = product(c.P, U, shares.crossings).add_(select(shares.comes_in, c.Qd @ S))
            if o_initial is not None:
                o_chunks += o_initial
            store(layout, o_chunks, o, c0)
        if finals is not None:
            endings = layout.endings(c0, c1)
            endings.store_states(endings.add_outer(c.Kr, U, _decayed(endings, c, initial, V)), finals)
            shares.add_ended(c, S, finals)
    return Forward(None if o is None else layout.finish(o), finals, states)


def _of_sequences(layout: SharedLayout, like: Tensor, states: Tensor | None) -> Tensor:
    """Memory for a state a sequence. Those of empty sequences are the given ones already."""
    if states is None:
        return like.new_zeros(layout.sequences, *like.shape)
    return states.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


def backward(
    layout: SharedLayout,
    x: Inputs,
    do: Tensor | None,
    dht: Tensor | None,
    initial: Tensor | None,
    options: KdaOptions,
    grads: Inputs | None,
    *,
    initial_gradient: bool,
) -> Tensor | None:
    """Fill ``grads``, if there are any, and return the gradient of the initial states ``[N, HV, K, V]`` if asked for.

    States and their cotangents ``dht`` are ``[N, HV, K, V]`` in the compute dtype.
    """
    HV, V, K = *x.v.shape[2:], x.k.shape[-1]
    dstate = x.v.new_zeros(HV, K, V, dtype=state_dtype(x.v))
    dinitial = _of_sequences(layout, dstate, dht) if initial_gradient else None
    states = None if grads is None else forward(layout, x, initial, options, output=False, entering=True).entering
    for c0, c1 in reversed(_runs(layout, x, states=initial_gradient or initial is not None or dht is not None)):
        shares, taken = layout.shares(c0, c1), take(layout, x, c0, c1)
        activated = activate(taken, options)
        c = prepare(layout, activated, options.scale, c0, c1, shares.crossings)
        dO = torch.zeros_like(c.v) if do is None else split(layout, layout.take(do, c0, c1).to(c.v.dtype), c0, c1)

        dU, endings, ended = product_t(c.P, dO, shares.crossings), None, None
        if dht is not None:
            endings = layout.endings(c0, c1)
            ended = endings.states(dht)
            dU += endings.read(ended, c.Kr)[0]
        Y = product_t(c.T, dU, shares.crossings)
        TKr = select(shares.goes_on, c.T.mT @ select(shares.goes_on, c.Kr))
        Kd_in, Qd_in, dO_in = (select(shares.comes_in, t) for t in (c.Kd, c.Qd, dO))
        entering = Qd_in.mT @ dO_in - Kd_in.mT @ select(shares.comes_in, c.beta * Y)
        if dht is not None:
            dended = shares.decay_to_end(c) * dht.index_select(0, shares.ending_seq)
            entering += _where(shares.ends, dended)
        dS, read, dstate = _scan(entering, c.gamma, TKr, c.beta * c.Kd, shares.through, dstate, reverse=True)
        Y += select(shares.goes_on, read)
        dW = c.beta * Y
        if dinitial is not None:
            parts = layout.beginnings(c0, c1)
            dparts = parts.add_outer(c.Qd, dO, _decayed(parts, c, dht, V))
            parts.store_states(parts.add_outer(c.Kd, -dW, dparts), dinitial)
            shares.add_begun(c, dS, dinitial)
        if grads is None or states is None:
            continue

        S = states[c0:c1]
        W, beginnings, own = c.v - select(shares.comes_in, c.Kd @ S), None, None
        if initial is not None:
            beginnings = layout.beginnings(c0, c1)
            own = beginnings.states(initial)
            W -= beginnings.read(own, c.Kd)[0]
        U = product(c.T, c.beta * W, shares.crossings)
        dPN = torch.stack((dO @ U.mT, (dW @ U.mT).neg_()), 3)
        dbeta = (Y * (W - product(c.N, U, shares.crossings))).sum(-1, keepdim=True)
        dKr = select(shares.goes_on, U @ dS.mT)
        up = torch.stack((dO, dW.neg()), 3).flatten(2, 3) @ S.mT
        up = select(shares.comes_in.unsqueeze(3), up.unflatten(2, (-1, 2)))
        # The gates of all of a part, by which a state decays that is there before and after it.
        all_of_part = torch.zeros_like(c.q)
        all_of_part[:, :, -1] = torch.where(shares.through.view(-1, 1, 1), (c.gamma * dS * S).sum(-1), 0)
        if endings is not None and ended is not None:
            dKr += endings.read(ended.mT, U)[0]
            all_of_part += shares.at_end((dended * S).sum(-1), c.q)
        if initial is not None and beginnings is not None and own is not None:
            dq, dk = beginnings.read(own.mT, dO, dW)
            up[..., 0, :] += dq
            up[..., 1, :] -= dk
            begun = c.gamma * dS * initial.index_select(0, shares.beginning_seq)
            all_of_part[:, :, -1] += _where(shares.begins, begun.sum(-1))
            if dht is not None:
                all_of_part += beginnings.at_last(own.mul_(_decayed(beginnings, c, dht, V)).sum(-1))
        up *= c.from_start.unsqueeze(3)
        k_down = c.to_end * dKr
        all_of_part += select(shares.last, running_sums(dKr * c.Kr, shares.crossings))
        pair_gradients(c, dPN, split(layout, activated.g, c0, c1), up, k_down, shares.crossings)
        dq, k_up = up.unbind(3)
        dg = running_sums(c.q * dq + c.k * (k_up - k_down) + all_of_part, shares.crossings, reverse=True)
        diagonal = dPN[..., 0, :].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        chunks = (dq + diagonal * c.k, k_up + k_down + diagonal * c.q, dW, dg, dbeta)
        store_gradients(layout, taken, activated, options, chunks, grads, c0, c1)
    return dinitial
