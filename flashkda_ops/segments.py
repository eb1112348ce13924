"""Sequences cut in segments that run side by side, on one device and over ranks.

Tokens act on the state of their sequence as an affine map (``docs/numerics.md``). So segments do not wait for each
other token by token: ``flashkda::chunk_kda_transition`` computes the maps of all, these composed in a tree give the
state that enters each, and from there ``flashkda::chunk_kda`` takes the segments as sequences of their own. Backwards
it is the same with the adjoint maps, ``dS = M^T dS' + C`` with K-first states, where ``C`` is the gradient of the
state that enters a segment from the segment's own outputs.

Of packed sequences at most one goes on from a segment to the next, so there is one map a segment however many there
are. A rank of ``distributed.context_parallel`` is to the next what a segment is: what its segments do is its message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashkda_ops.validation import Sizes

__all__ = ["Gates", "Layout", "applied", "composed", "count", "entered", "gradients", "layout", "of_call"]


# ---------------------------------------------------------------------------------------------------------------------
# Affine maps of K-first states, M S + B, as one tensor [M | B] of shape [..., K, K + V]
#
# Where a packed sequence starts, M is zero: what comes before is another sequence's, and the map *forgets* it. A
# product with that zero would not, since 0 times NaN is NaN: such a map's result is B by selection.
# ---------------------------------------------------------------------------------------------------------------------


class _Maps(NamedTuple):
    """Maps, and which of them forget what comes before ``[..., n, 1, 1]``; None where it is known that none does."""

    maps: Tensor  # [..., K, K + V]
    forgets: Tensor | None

    def at(self, index: slice) -> _Maps:
        """The maps of a slice of ``n``, where these are ``[..., n, K, K + V]``."""
        return _Maps(self.maps[..., index, :, :], None if self.forgets is None else self.forgets[..., index, :, :])

    def after(self, first: _Maps) -> _Maps:
        """Each of these maps composed with one that is applied first."""
        K = self.maps.shape[-2]
        pairs = self.maps[..., :K] @ first.maps
        pairs[..., K:].add_(self.maps[..., K:])
        if self.forgets is None or first.forgets is None:
            return _Maps(pairs, None)
        return _Maps(torch.where(self.forgets, self.maps, pairs), self.forgets | first.forgets)

    def applied(self, S: Tensor) -> Tensor:
        """``M S + B``."""
        M, B = self.maps.split((S.shape[-2], S.shape[-1]), -1)
        result = M @ S + B
        return result if self.forgets is None else torch.where(self.forgets, B, result)


def _maps(maps: Tensor, packed: bool) -> _Maps:
    """Maps that come from other ranks, which say by an M of zeros that they forget. One that forgets by its gates may
    be taken for one of those: it makes the same of every finite state."""
    return _Maps(maps, ~maps[..., : maps.shape[-2]].any(-1).any(-1)[..., None, None] if packed else None)


def _joined(first: _Maps, second: _Maps) -> _Maps:
    """Both, one behind the other along ``n``."""
    forgets = None
    if first.forgets is not None and second.forgets is not None:
        forgets = torch.cat((first.forgets, second.forgets), -3)
    return _Maps(torch.cat((first.maps, second.maps), -3), forgets)


def _levels(maps: _Maps) -> list[_Maps]:
    """``n >= 1`` maps ``[..., n, K, K + V]``, those of neighbours composed, and so on up to one map for all.

    The first is applied first.
    """
    levels = [maps]
    while (n := maps.maps.shape[-3]) > 1:
        pairs = maps.at(slice(1, n, 2)).after(maps.at(slice(0, n - 1, 2)))
        maps = _joined(pairs, maps.at(slice(n - 1, n))) if n % 2 else pairs
        levels.append(maps)
    return levels


def _states_before(levels: list[_Maps], S: Tensor) -> Tensor:
    """The state ``[..., n, K, V]`` before each of the ``n`` maps, where ``S [..., K, V]`` is that before the first."""
    states = S.unsqueeze(-3)
    for maps in reversed(levels[:-1]):
        n = maps.maps.shape[-3]
        before = states[..., : n // 2, :, :]
        between = maps.at(slice(0, n - 1, 2)).applied(before)
        pairs = torch.stack((before, between), -3).flatten(-4, -3)
        states = torch.cat((pairs, states[..., n // 2 :, :, :]), -3) if n % 2 else pairs
    return states


def composed(maps: Tensor, *, packed: bool) -> Tensor:
    """One map ``[..., K, K + V]`` for all ``n``."""
    return _levels(_maps(maps, packed))[-1].maps.squeeze(-3)


def applied(maps: Tensor, S: Tensor, *, packed: bool) -> Tensor:
    """``M S + B``."""
    return _maps(maps, packed).applied(S)


# ---------------------------------------------------------------------------------------------------------------------
# Segments, and where the sequences lie in them
# ---------------------------------------------------------------------------------------------------------------------

# The multiprocessors of an H100.
BLOCKS = 132
# Fewer tokens do not pay for a segment.
SHORTEST = 1024


def count(heads: int, T: int, shortest: int = SHORTEST, *, packed: bool) -> int:
    """In how many segments of equal length ``T`` tokens run; ``heads`` counts those of all rows.

    A segment of a head is two blocks' work, each of which takes half of its V and half of its map. Among packed
    sequences it is one block's: with the pieces beside them there are more than the kernels take in halves.
    """
    abreast = BLOCKS if packed else BLOCKS // 2
    return max(1, min(abreast // max(1, heads), T // shortest))


# Where maps cost less than they save (docs/kernel_notes.md): not with fewer tokens a segment, nor in shorter calls, nor
# with more heads.
_SHORTEST_OF_CALL, _LEAST_TOKENS, _MOST_HEADS = 4096, 32768, 16
# Dense calls have gradients beside their scans, which segments do not: these pay in longer calls, and where scans may
# be clusters, with so many tokens a head and while that many heads leave most of a GPU idle.
_DENSE_TOKENS, _DENSE_TOKENS_A_HEAD, _DENSE_HEADS = 65536, 8192, 12


def of_call(s: Sizes, *, packed: bool, clusters: bool) -> int:
    """In how many segments the kernels take a call of one device, whose scans may be clusters or not. Apart from that,
    shapes alone decide.
    """
    heads = s.N * s.HV
    most_heads, tokens = _MOST_HEADS, _LEAST_TOKENS if packed else _DENSE_TOKENS
    if clusters and not packed:
        most_heads, tokens = _DENSE_HEADS, max(tokens, heads * _DENSE_TOKENS_A_HEAD)
    pays = heads <= most_heads and tokens <= s.T
    return count(heads, s.T, _SHORTEST_OF_CALL, packed=packed) if pays else 1


class Gates(NamedTuple):
    """What a transition is made of, apart from the tokens."""

    A_log: Tensor | None
    dt_bias: Tensor | None
    l2norm: bool
    gate: bool
    sigmoid: bool
    negative: bool
    lower_bound: float | None

    @classmethod
    def of(cls, call: Any) -> Gates:
        """From the arguments of an op, by their names."""
        return cls(
            call.A_log,
            call.dt_bias,
            call.use_qk_l2norm_in_kernel,
            call.use_gate_in_kernel,
            call.use_beta_sigmoid_in_kernel,
            call.allow_neg_eigval,
            call.lower_bound,
        )


def _transition(tokens: Sequence[Tensor], cu_seqlens: Tensor | None, o: Gates) -> tuple[Tensor, Tensor]:
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

    packed = False

    def __init__(self, q: Tensor, segments: int, rank: int, ranks: int) -> None:
        self.spans, T = q.shape[:2]
        self.n = segments
        self.first, self.last = rank == 0, rank == ranks - 1
        self.cu_seqlens = self.forgets = None
        if segments > 1:  # of the rows behind each other
            if T > 0 and T % segments == 0:
                self.cu_seqlens = torch.arange(0, self.spans * T + 1, T // segments, device=q.device)
            else:
                self.cu_seqlens = torch.arange(self.spans * segments + 1, device=q.device) * T // segments

    def tokens(self, x: Tensor) -> Tensor:
        return x if self.cu_seqlens is None or self.spans == 1 else x.flatten(0, 1).unsqueeze(0)

    def maps(self, tokens: Sequence[Tensor], o: Gates, own: Tensor | None) -> tuple[Tensor, Tensor]:
        return _transition(tokens, self.cu_seqlens, o)

    def message(self, map: Tensor, own: Tensor | None) -> Tensor:
        if own is None or not self.first:
            return map
        return torch.cat((map[..., : map.shape[-2]], applied(map, own, packed=False)), -1)

    def entering(self, S: Tensor, own: Tensor | None) -> Tensor:
        return S if own is None or not self.first else own

    def initial_states(self, S: Tensor, own: Tensor | None) -> Tensor:
        return S

    def final_states(self, states: Tensor) -> Tensor:
        states = self._rows(states)[:, -1]
        if not self.last:
            return states.new_zeros(states.shape)
        # Not contiguous(), which may return what it is given: of an autograd.Function torch 2.11 compiles so that all
        # that forward computes is an output, too, and a tensor that is two outputs passes its gradient to the last.
        return states.clone(memory_format=torch.contiguous_format)

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
    packed = True

    def __init__(
        self, q: Tensor, segments: int, cu_seqlens: Tensor, rank_offsets: Tensor | None, rank: int, ranks: int
    ) -> None:
        T, device, self.n = q.shape[1], q.device, segments
        if rank_offsets is None:
            offsets = torch.arange(ranks + 1, device=device) * T
        else:
            offsets = rank_offsets.long().cummax(0).values
        last_rank, N = ranks - 1, cu_seqlens.shape[0] - 1
        cu = torch.minimum(torch.maximum(cu_seqlens.long(), offsets[0]).cummax(0).values, offsets[-1])
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
        # No segment has tokens of no sequence, ahead of the first one or behind the last.
        bounds = torch.minimum(torch.maximum(low + inside * T // segments, here[0]), here[-1])
        owner = torch.searchsorted(cu, bounds, right=True) - 1
        first_token = cu[owner.clamp(min=0)]
        self.crosses = (owner >= 0) & (owner < N) & (first_token < bounds + (inside % segments > 0))
        self.owner = owner.clamp(0, N - 1)
        # [n]: a sequence goes on from this segment to the next; it came from the one before, too
        self.goes_on = self.crosses[1:]
        self.goes_through = self.crosses[:-1] & self.goes_on & (owner[:-1] == owner[1:])
        self.forgets = ~self.goes_through.view(-1, 1, 1)
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

    def maps(self, tokens: Sequence[Tensor], o: Gates, own: Tensor | None) -> tuple[Tensor, Tensor]:
        M, B = (x[1::2] for x in _transition(tokens, self.parts, o))
        if own is not None:
            starts = (self.goes_on & ~self.goes_through).view(-1, 1, 1, 1)
            B = torch.where(starts, B + M @ own[self.owner[1:]], B)
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


Layout = _Dense | _Packed


def layout(
    q: Tensor,
    cu_seqlens: Tensor | None,
    segments: int,
    *,
    rank_offsets: Tensor | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Layout:
    """Where the sequences of a rank's tokens lie in so many segments."""
    if cu_seqlens is None:
        return _Dense(q, segments, rank, ranks)
    return _Packed(q, segments, cu_seqlens, rank_offsets, rank, ranks)


def _by_span(x: Tensor, layout: Layout) -> Tensor:
    """``[spans * n, HV, ...]`` to ``[spans, HV, n, ...]``."""
    return x.unflatten(0, (layout.spans, layout.n)).transpose(1, 2)


def _by_segment(x: Tensor) -> Tensor:
    """The inverse of :func:`_by_span`."""
    return x.transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Both directions
# ---------------------------------------------------------------------------------------------------------------------

Incoming = Callable[[Tensor], Tensor]
"""From this rank's message, the state ``[spans, HV, K, V]`` that enters it; backwards, the gradient of what leaves."""


def nothing_incoming(message: Tensor) -> Tensor:
    """Where one rank is all there are."""
    return torch.zeros_like(message[..., message.shape[-2] :])


def entered(
    layout: Layout,
    tokens: Sequence[Tensor],
    gates: Gates,
    initial_state: Tensor | None,
    v_first: bool,
    incoming: Incoming = nothing_incoming,
) -> tuple[Tensor, Tensor]:
    """``M [spans * n, HV, K, K]`` of the segments, and the initial states of the pieces, as V-first as the given ones.

    ``tokens``: k, v, g and beta as the layout has them.
    """
    own = initial_state.mT if initial_state is not None and v_first else initial_state
    M, B = layout.maps(tokens, gates, own)
    maps = torch.cat((_by_span(M, layout), _by_span(B, layout)), -1)
    levels = _levels(_Maps(maps, layout.forgets))
    S = layout.entering(incoming(layout.message(levels[-1].maps.squeeze(-3), own)), own)
    initial = layout.initial_states(_by_segment(_states_before(levels, S)), own)
    return M, (initial.mT if v_first else initial).contiguous()


def gradients(
    layout: Layout,
    do: Tensor | None,
    dfinal: Tensor,
    inputs: Sequence[Tensor | None],
    initial: Tensor,
    M: Tensor,
    options: Sequence[object],
    needed: Sequence[bool],
    incoming: Incoming = nothing_incoming,
) -> list[Tensor | None]:
    """The gradients of ``flashkda::chunk_kda``'s first eight arguments; None where they are not needed.

    ``do`` and ``inputs`` (the first seven arguments) are as the layout has them, ``initial`` and ``M`` as
    :func:`entered` returned them, ``dfinal`` is the gradient of the final states of the sequences, and ``options`` are
    the arguments of the op from ``scale`` to ``state_v_first``.
    """
    v_first = options[-1]
    backward = torch.ops.flashkda.chunk_kda_backward
    arguments = (*inputs, initial, layout.cu_seqlens, *options, True)  # pieces are not cut again
    dpieces = layout.of_final_states(dfinal)
    C = layout.of_entering(backward(do, dpieces, *arguments, [False] * 7 + [True])[7])
    C = C.mT if v_first else C
    # From the last segment to the first.
    maps = torch.cat((_by_span(M.mT, layout), _by_span(C, layout)), -1).flip(-3)
    levels = _levels(_Maps(maps, None if layout.forgets is None else layout.forgets.flip(0)))
    dS = _by_segment(_states_before(levels, incoming(levels[-1].maps.squeeze(-3))).flip(-3))
    dpieces = layout.of_leaving(dpieces, dS.mT if v_first else dS)
    *grads, dinitial = backward(do, dpieces, *arguments, needed)
    return [*grads, layout.of_initial_states(dinitial) if needed[7] else dinitial]
