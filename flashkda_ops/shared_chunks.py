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

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
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
    as_bits,
    decay,
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

__all__ = [
    "SharedLayout",
    "backward",
    "final_states",
    "forward",
    "forward_at_offsets",
    "forward_with_checkpoints",
]


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
        cu = self.cu = safe_cu_seqlens(cu_seqlens, T)
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

    def of_last(self, x: Tensor) -> Tensor:
        """The rows of ``x [n, M, C, D]`` that are the parts' last tokens ``[parts, M, D]``."""
        return x[self._last // self._chunk, :, self._last % self._chunk]

    def at_last(self, values: Tensor) -> Tensor:
        """The inverse: ``values [parts, M, D]`` at the last tokens ``[n, M, C, D]``, zero at all others."""
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
    gamma = _where(parts.whole, parts.of_last(x.from_start)).unsqueeze(-1)
    if states is None:
        return gamma.new_zeros(*gamma.shape[:3], V)
    return parts.states(states).mul_(gamma)


class _Run(NamedTuple):
    """What the forward pass computes of the chunks ``c0`` to ``c1``."""

    c0: int
    c1: int
    x: Chunks
    shares: _Shares
    S: Tensor  # [n, M, K, V]: the states that come in
    U: Tensor  # [n, M, C, V]
    o_initial: Tensor | None  # [n, M, C, V]: what is read of initial states


def _forward(
    layout: SharedLayout, x: Inputs, initial: Tensor | None, options: KdaOptions, *, states: bool
) -> Iterator[_Run]:
    """The scan of the forward pass, run by run; ``states``: there will be products with a state a sequence."""
    HV, V, K = *x.v.shape[2:], x.k.shape[-1]
    state = x.v.new_zeros(HV, K, V, dtype=layout.dtype)
    for c0, c1 in _runs(layout, x, states=states or initial is not None):
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
        yield _Run(c0, c1, c, shares, S, U, o_initial)


def _store_output(layout: SharedLayout, run: _Run, o: Tensor) -> None:
    chunks = product(run.x.P, run.U, run.shares.crossings)
    chunks += select(run.shares.comes_in, run.x.Qd @ run.S)
    if run.o_initial is not None:
        chunks += run.o_initial
    store(layout, chunks, o, run.c0)


def forward(
    layout: SharedLayout, x: Inputs, initial: Tensor | None, options: KdaOptions, *, final: bool
) -> tuple[Tensor, Tensor | None]:
    """Output ``[1, T, HV, V]`` and, if asked for, final states ``[N, HV, K, V]`` in the compute dtype.

    Initial states are ``[N, HV, K, V]`` in the compute dtype, zero where there are none.
    """
    o = x.v.new_empty(1, layout.rows, *x.v.shape[2:], dtype=layout.dtype)
    finals = _of_sequences(layout, x, initial) if final else None
    for run in _forward(layout, x, initial, options, states=final):
        _store_output(layout, run, o)
        if finals is not None:
            _store_final(layout, run, initial, finals)
    return layout.finish(o), finals


def final_states(layout: SharedLayout, x: Inputs, initial: Tensor | None, options: KdaOptions) -> Tensor:
    """Those of :func:`forward` alone."""
    finals = _of_sequences(layout, x, initial)
    for run in _forward(layout, x, initial, options, states=True):
        _store_final(layout, run, initial, finals)
    return finals


def _store_final(layout: SharedLayout, run: _Run, initial: Tensor | None, finals: Tensor) -> None:
    """The final states of the sequences that end in a run."""
    endings = layout.endings(run.c0, run.c1)
    decayed = _decayed(endings, run.x, initial, finals.shape[-1])
    endings.store_states(endings.add_outer(run.x.Kr, run.U, decayed), finals)
    run.shares.add_ended(run.x, run.S, finals)


def _of_sequences(layout: SharedLayout, x: Inputs, states: Tensor | None) -> Tensor:
    """Memory for a state a sequence. Those of empty sequences are the given ones already."""
    if states is None:
        return x.v.new_zeros(layout.sequences, x.v.shape[2], x.k.shape[3], x.v.shape[3], dtype=layout.dtype)
    return states.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------------------
# States within sequences
# ---------------------------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """What states after any of some tokens, the *cuts*, are made of: of all chunks."""

    S: Tensor  # [chunks, M, K, V]
    U: Tensor  # [chunks, M, C, V]
    Kr: Tensor  # [chunks, M, C, K]: keys, decayed to the next cut, end of the sequence, or end of the chunk
    decay: Tensor  # [chunks, M, C, K]: from the cut, or start of the sequence or chunk, before a token to that token


def _keep(
    layout: SharedLayout, x: Inputs, initial: Tensor | None, options: KdaOptions, cuts: Tensor
) -> tuple[Tensor, _Kept]:
    """The output ``[1, T, HV, V]``, and what it takes to have states at ``cuts``: all tokens at which something begins
    or ends, in order, sequences included."""
    HV, V, K = *x.v.shape[2:], x.k.shape[-1]
    pieces = SharedLayout(cuts, layout.T, layout.chunk, layout.dtype)
    n, C = layout.chunks, layout.chunk
    shapes = ((K, V), (C, V), (C, K), (C, K))
    kept = _Kept(*(x.v.new_empty(n, HV, *shape, dtype=layout.dtype) for shape in shapes))
    o = x.v.new_empty(1, layout.rows, *x.v.shape[2:], dtype=layout.dtype)
    for run in _forward(layout, x, initial, options, states=True):
        _store_output(layout, run, o)
        c0, c1, shares = run.c0, run.c1, pieces.shares(run.c0, run.c1)
        g = split(layout, activate(take(layout, x, c0, c1), options).g, c0, c1)
        behind = running_sums(select(~shares.last, g.roll(-1, 2)), shares.crossings, reverse=True)
        values = run.S, run.U, run.x.k * decay(behind), decay(running_sums(g, shares.crossings))
        for out, value in zip(kept, values, strict=True):
            out[c0:c1] = value
    return layout.finish(o), kept


def _states_after(
    kept: _Kept, before: Tensor, first: Tensor, tokens: Tensor, comes_in: Tensor, dtype: torch.dtype
) -> Tensor:
    """States ``[G, HV, K, V]`` after parts of ``tokens [G]`` tokens, none included, from row ``first [G]`` on, of one
    chunk each. They start from ``before``, or where ``comes_in`` says so from what comes into their chunk."""
    chunks, C = kept.U.shape[0], kept.U.shape[2]
    length, order = tokens.sort(descending=True, stable=True)
    length, order = length[: chunks * C], order[: chunks * C]
    first = first[order].clamp(0, chunks * C - 1)
    parts = _Parts(first, length, order, as_bits(length > 0, dtype), chunks * C, C)
    entered = torch.where(
        comes_in[order].view(-1, 1, 1, 1), kept.S.index_select(0, first // C), before.index_select(0, order)
    )
    states = before.clone(memory_format=torch.contiguous_format)
    entered *= parts.of_last(kept.decay).unsqueeze(-1)
    parts.store_states(parts.add_outer(kept.Kr, kept.U, entered), states)
    return states


def _last_part(start: Tensor, begin: Tensor, end: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens ``begin`` to ``end`` of sequences that begin at ``start``: the first one of their last chunk, how many
    there are of them in it, and whether it is the first of that chunk and others came before."""
    first_of_chunk = (end - 1).clamp(min=0) // chunk * chunk
    first = torch.maximum(begin, first_of_chunk)
    return first, torch.where(end > begin, end - first, 0), (start < first_of_chunk) & (first == first_of_chunk)


def forward_at_offsets(
    layout: SharedLayout, x: Inputs, initial: Tensor, options: KdaOptions, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`forward`, and the states at ``bounds [N, C]`` but the first of each sequence, ``[N, C - 1, HV, K, V]``.

    The bounds of a sequence never decrease; the first is its start and the last its end.
    """
    o, kept = _keep(layout, x, initial, options, torch.cat((bounds[:, :-1].flatten(), bounds[-1, -1:])))
    states, start = [initial], bounds[:, 0]
    for begin, end in pairwise(bounds.unbind(1)):
        part = _last_part(start, begin, end, layout.chunk)
        states.append(_states_after(kept, states[-1], *part, layout.dtype))
    return o, torch.stack(states[1:], 1)


def forward_with_checkpoints(
    layout: SharedLayout, x: Inputs, initial: Tensor, options: KdaOptions, interval: int, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`forward`, and the states before every ``interval``-th token of each sequence, those of all in order and
    zeros behind them ``[most, HV, K, V]``. The chunks are no longer than the interval."""
    start, end = layout.cu[:-1], layout.cu[1:]
    needed = (end - start + interval - 1) // interval
    ends = needed.cumsum(0)
    index = torch.arange(most, device=start.device)
    seq = torch.searchsorted(ends, index, right=True)
    exists, seq = seq < layout.sequences, seq.clamp(max=layout.sequences - 1)
    at = start[seq] + torch.where(exists, (index - (ends - needed)[seq]) * interval, 0)
    o, kept = _keep(layout, x, initial, options, torch.cat((layout.cu, at)).sort().values)
    first = torch.where(exists.view(-1, 1, 1, 1), initial.index_select(0, seq), 0)
    states = _states_after(kept, first, *_last_part(start[seq], start[seq], at, layout.chunk), layout.dtype)
    latest = states.index_select(0, (ends - 1).clamp(0, most - 1))
    before = torch.where((needed > 0).view(-1, 1, 1, 1), latest, initial)
    last = _last_part(start, torch.minimum(start + (needed - 1).clamp(min=0) * interval, end), end, layout.chunk)
    return o, _states_after(kept, before, *last, layout.dtype), states


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
    dstate = x.v.new_zeros(HV, K, V, dtype=layout.dtype)
    dinitial = _of_sequences(layout, x, dht) if initial_gradient else None
    states = None
    if grads is not None:
        states = dstate.new_empty(layout.chunks, HV, K, V)
        for run in _forward(layout, x, initial, options, states=False):
            states[run.c0 : run.c1] = run.S
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
