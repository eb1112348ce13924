"""Kimi Delta Attention in chunk form, in batched matrix products: any device, any head size, forward and backward.

Symbols are those of the chunk form in ``docs/numerics.md``; states are K-first (``[K, V]``) in here. Two things keep it
exact in every gate regime:

* No exponential of a positive number is taken, and no difference of two cumulative sums. The decay between two tokens
  of a chunk is split at a midpoint of a binary tree over the chunk, so each factor is the exponential of a sum of log
  decays (``_levels``); a decay that underflows does so alone.
* The triangular system is solved by substitution, never through a series of powers, which cancels for parallel keys.

Nothing here reads the value of a tensor on the host: sequences are packed into chunks by index arithmetic on the
device, over a number of chunks that follows from the shapes alone. So the portable path can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashkda_ops.reference import beta_activation, l2norm, log_decay

__all__ = ["Gradients", "KdaOptions", "chunk_kda", "chunk_kda_backward", "chunk_kda_paged", "recurrent_kda_paged"]

CHUNK = 64


@dataclass(frozen=True)
class KdaOptions:
    """The options of the recurrence that are no tensors (``scale`` resolved)."""

    scale: float
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    lower_bound: float | None = None


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
# Tokens to chunks and back
# ---------------------------------------------------------------------------------------------------------------------


class _DenseLayout:
    """``[B, T, ...]``, every row a sequence: chunk ``c`` of all rows advances at once."""

    seq: None = None

    def __init__(self, B: int, T: int, chunk: int) -> None:
        self.B, self.T, self.chunk = B, T, chunk
        self.chunks = -(-T // chunk)
        self.sequences = B

    def split(self, x: Tensor) -> Tensor:
        """``[B, T, X, D]`` to ``[chunks, B * X, chunk, D]``; rows past ``T`` are zero."""
        B, T, X, D = x.shape
        x = F.pad(x, (0, 0, 0, 0, 0, self.chunks * self.chunk - T))
        x = x.view(B, self.chunks, self.chunk, X, D).permute(1, 0, 3, 2, 4)
        return x.reshape(self.chunks, B * X, self.chunk, D)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        n, BX, C, D = x.shape
        x = x.view(n, self.B, BX // self.B, C, D).permute(1, 0, 3, 2, 4)
        return x.reshape(self.B, n * C, BX // self.B, D)[:, : self.T].contiguous()


class _PackedLayout:
    """``[1, T, ...]`` with ``cu_seqlens``: the chunks of all sequences in one row, in order.

    A malformed ``cu_seqlens`` is made harmless by clamping it to ``[0, T]`` and taking its running maximum. ``chunks``
    is the most that ``N`` sequences of ``T`` tokens can need; ``seq`` is ``N`` for those that they do not.
    """

    def __init__(self, cu_seqlens: Tensor, T: int, chunk: int) -> None:
        N = cu_seqlens.shape[0] - 1
        self.T, self.chunk = T, chunk
        self.chunks = (T + N * (chunk - 1)) // chunk
        self.sequences = N
        device = cu_seqlens.device
        cu = cu_seqlens.long().clamp(0, T).cummax(0).values
        lengths = cu.diff()
        needed = (lengths + (chunk - 1)) // chunk
        ends = needed.cumsum(0)
        starts = ends - needed

        c = torch.arange(self.chunks, device=device)
        self.seq = torch.searchsorted(ends, c, right=True)
        within = self.seq.clamp(max=N - 1)
        self.position = c - starts[within]
        used = self.seq < N
        self.first = used & (self.position == 0)
        self.last = used & (c == ends[within] - 1)
        offset = self.position.unsqueeze(-1) * chunk + torch.arange(chunk, device=device)
        self.row_valid = used.unsqueeze(-1) & (offset < lengths[within].unsqueeze(-1))
        self.row_token = torch.where(self.row_valid, cu[within].unsqueeze(-1) + offset, 0).view(-1)

        t = torch.arange(T, device=device)
        owner = torch.searchsorted(cu[1:].contiguous(), t, right=True)
        holder = owner.clamp(max=N - 1)
        self.token_valid = (owner < N) & (t >= cu[0])
        self.token_row = torch.where(self.token_valid, starts[holder] * chunk + t - cu[holder], 0)
        self.token_seq, self.token_position = holder, t - cu[holder]
        self.empty = lengths == 0

    def split(self, x: Tensor) -> Tensor:
        """``[1, T, X, D]`` to ``[chunks, X, chunk, D]``; rows of no token are zero, whatever ``x`` holds."""
        _, _, X, D = x.shape
        x = x[0].index_select(0, self.row_token).view(self.chunks, self.chunk, X, D)
        x = torch.where(self.row_valid[..., None, None], x, 0)
        return x.transpose(1, 2).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`split`; tokens of no sequence are zero."""
        n, X, C, D = x.shape
        x = x.transpose(1, 2).reshape(n * C, X, D).index_select(0, self.token_row)
        return torch.where(self.token_valid[:, None, None], x, 0).unsqueeze(0)


_Layout = _DenseLayout | _PackedLayout


def _layout(q: Tensor, cu_seqlens: Tensor | None, chunk: int) -> _Layout:
    if cu_seqlens is None:
        return _DenseLayout(q.shape[0], q.shape[1], chunk)
    return _PackedLayout(cu_seqlens, q.shape[1], chunk)


def _chunk_length(tokens_per_sequence: int, longest: int = CHUNK) -> int:
    """The smallest power of two that holds a sequence, up to ``longest``."""
    return min(longest, 1 << max(0, tokens_per_sequence - 1).bit_length())


# ---------------------------------------------------------------------------------------------------------------------
# The factors of a chunk
# ---------------------------------------------------------------------------------------------------------------------


class _Level(NamedTuple):
    """Blocks of ``size`` tokens: their second half reads their first half through the midpoint between them."""

    size: int
    hi_decay: Tensor  # [n, M, C / size, size / 2, K]: from the midpoint to each token of the second half
    lo_decay: Tensor  # [n, M, C / size, size / 2, K]: from each token of the first half to the midpoint


def _levels(g: Tensor) -> tuple[list[_Level], Tensor, Tensor]:
    """Decays between tokens of a chunk, from log decays ``g [n, M, C, K]``.

    Returns the levels of the tree, the decay from the chunk's start to each token (its own included), and the decay
    from each token (its own excluded) to the chunk's end.
    """
    n, M, C, K = g.shape
    prefix, suffix = g, torch.zeros_like(g)  # within blocks of `half` tokens
    levels = []
    half = 1
    while half < C:
        blocks = (n, M, C // (2 * half), 2, half, K)
        prefix_lo, prefix_hi = prefix.view(blocks).unbind(3)
        suffix_lo, suffix_hi = suffix.view(blocks).unbind(3)
        levels.append(_Level(2 * half, prefix_hi.exp(), suffix_lo.exp()))
        total_lo, total_hi = prefix_lo[..., -1:, :], prefix_hi[..., -1:, :]
        prefix = torch.stack((prefix_lo, prefix_hi + total_lo), 3).view(n, M, C, K)
        suffix = torch.stack((suffix_lo + total_hi, suffix_hi), 3).view(n, M, C, K)
        half *= 2
    return levels, prefix.exp(), suffix.exp()


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and second halves of blocks of ``size`` rows: views ``[n, M, C / size, size / 2, D]`` of ``[n, M, C, D]``."""
    n, M, C, D = x.shape
    lo, hi = x.view(n, M, C // size, 2, size // 2, D).unbind(3)
    return lo, hi


def _score_blocks(scores: Tensor, size: int) -> Tensor:
    """The blocks (second half, first half) of ``scores [n, M, C, C]``: a view ``[n, M, C / size, size / 2, size / 2]``."""
    n, M, C, _ = scores.shape
    half = size // 2
    blocks = scores.view(n, M, C // size, size, C // size, size).diagonal(dim1=2, dim2=4)
    return blocks[:, :, half:, :half].permute(0, 1, 4, 2, 3)


def _solve(L: Tensor, rhs: Tensor, *, transpose: bool = False) -> Tensor:
    """``(I + L)^-1 rhs``, or ``(I + L)^-T rhs``, for strictly lower ``L``."""
    if L.shape[-1] == 1:
        return rhs
    return torch.linalg.solve_triangular(L.mT if transpose else L, rhs, upper=transpose, unitriangular=True)


@dataclass
class _Chunks:
    """A call's tokens in chunks, with the factors that both directions need. Shapes ``[n, M, C, .]``, ``M = B * HV``."""

    q: Tensor  # scaled, and normalised if asked
    k: Tensor
    v: Tensor
    beta: Tensor  # [n, M, C, 1]
    levels: list[_Level]
    from_start: Tensor  # exp(G)
    to_end: Tensor  # exp(G_C - G)
    gamma: Tensor  # [n, M, K, 1]: exp(G_C)
    N: Tensor  # [n, M, C, C]: strictly lower Kd Ki^T
    P: Tensor  # [n, M, C, C]: lower Qd Ki^T

    @property
    def L(self) -> Tensor:
        return self.beta * self.N


def _prepare(layout: _Layout, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> _Chunks:
    """Factors from activated tokens: ``q`` scaled, ``g`` the log decay, ``q`` and ``k`` with as many heads as ``v``."""
    q, k, v, g = (layout.split(x) for x in (q, k, v, g))
    beta = layout.split(beta.unsqueeze(-1))
    levels, from_start, to_end = _levels(g)
    n, M, C, _ = k.shape
    N, P = k.new_zeros(n, M, C, C), k.new_zeros(n, M, C, C)
    P.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    for level in levels:
        k_lo, k_hi = _halves(k, level.size)
        right = (k_lo * level.lo_decay).mT
        _score_blocks(N, level.size).copy_((k_hi * level.hi_decay) @ right)
        _score_blocks(P, level.size).copy_((_halves(q, level.size)[1] * level.hi_decay) @ right)
    gamma = from_start[:, :, -1].unsqueeze(-1)
    return _Chunks(q, k, v, beta, levels, from_start, to_end, gamma, N, P)


# ---------------------------------------------------------------------------------------------------------------------
# The scans
# ---------------------------------------------------------------------------------------------------------------------


class _StateRows:
    """The running state of the scan, with the sequences' own rows ``[N + 1, HV, K, V]`` behind a packed layout.

    Dense layouts carry ``[B * HV, K, V]`` for all sequences at once. Packed ones carry ``[HV, K, V]``, take over a
    sequence's row where it begins, and store into it after every chunk, so that the last one remains. Row ``N``
    belongs to chunks of no sequence.
    """

    def __init__(self, layout: _Layout, rows: Tensor) -> None:
        self.layout = layout
        self.shape = rows.shape
        if isinstance(layout, _PackedLayout):
            self.rows = torch.cat((rows, torch.zeros_like(rows[:1])))
            self.state = torch.zeros_like(rows[0])
        else:
            self.state = rows.flatten(0, 1)

    def enter(self, c: int, begins: Tensor | None) -> Tensor:
        if isinstance(self.layout, _PackedLayout):
            assert begins is not None
            row = self.rows.index_select(0, self.layout.seq[c : c + 1])[0]
            self.state = torch.where(begins[c], row, self.state)
        return self.state

    def leave(self, c: int, state: Tensor) -> None:
        self.state = state
        if isinstance(self.layout, _PackedLayout):
            self.rows.index_copy_(0, self.layout.seq[c : c + 1], state.unsqueeze(0))

    def result(self) -> Tensor:
        if isinstance(self.layout, _PackedLayout):
            return self.rows[:-1]
        return self.state.reshape(self.shape)


class _Scan(NamedTuple):
    U: Tensor  # [n, M, C, V]
    inter: Tensor  # [n, M, C, V]: Qd S, the part of the output that comes from before the chunk
    final: Tensor  # [N, HV, K, V]
    entering: Tensor | None  # [n, M, K, V]
    leaving: Tensor | None  # [n, M, K, V]


def _scan_forward(
    layout: _Layout, x: _Chunks, initial: Tensor, *, keep_entering: bool = False, keep_leaving: bool = False
) -> _Scan:
    n, M, C, V = x.v.shape
    K = x.k.shape[-1]
    Kd, Qd, Kr = x.k * x.from_start, x.q * x.from_start, x.k * x.to_end
    solved = _solve(x.L, x.beta * torch.cat((x.v, Kd), -1))
    AV, AKd = solved.split((V, K), -1)
    readers = torch.cat((AKd, Qd), -2)  # one product reads the state for both
    Kr_t = Kr.mT
    U, inter = x.v.new_empty(n, M, C, V), x.v.new_empty(n, M, C, V)
    entering = x.v.new_empty(n, M, K, V) if keep_entering else None
    leaving = x.v.new_empty(n, M, K, V) if keep_leaving else None
    rows = _StateRows(layout, initial)
    begins = layout.first if isinstance(layout, _PackedLayout) else None
    for c in range(n):
        S = rows.enter(c, begins)
        if entering is not None:
            entering[c] = S
        read = readers[c] @ S
        torch.sub(AV[c], read[:, :C], out=U[c])
        inter[c] = read[:, C:]
        S = torch.baddbmm(S * x.gamma[c], Kr_t[c], U[c])
        if leaving is not None:
            leaving[c] = S
        rows.leave(c, S)
    return _Scan(U, inter, rows.result(), entering, leaving)


def _scan_backward(layout: _Layout, x: _Chunks, dO: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The forward scan reversed. Returns ``dW``, the gradient of each chunk's leaving state, and that of the initial."""
    n, M, C, V = x.v.shape
    K = x.k.shape[-1]
    Kd_t, Kr = (x.k * x.from_start).mT, x.k * x.to_end
    read_by_output = (x.q * x.from_start).mT @ dO
    solved = _solve(x.L, torch.cat((x.P.mT @ dO, Kr), -1), transpose=True)
    seed, reader = (x.beta * solved).split((V, K), -1)
    dW, dleaving = x.v.new_empty(n, M, C, V), x.v.new_empty(n, M, K, V)
    rows = _StateRows(layout, dfinal)
    begins = layout.last if isinstance(layout, _PackedLayout) else None
    for c in reversed(range(n)):
        dS = rows.enter(c, begins)
        dleaving[c] = dS
        torch.baddbmm(seed[c], reader[c], dS, out=dW[c])
        rows.leave(c, torch.baddbmm(dS * x.gamma[c] + read_by_output[c], Kd_t[c], dW[c], alpha=-1))
    return dW, dleaving, rows.result()


# ---------------------------------------------------------------------------------------------------------------------
# The ops
# ---------------------------------------------------------------------------------------------------------------------


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class _Activated(NamedTuple):
    q: Tensor  # [B, T, HV, K], scaled
    k: Tensor
    v: Tensor
    g: Tensor  # log decay
    beta: Tensor


def _activate(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, o: KdaOptions
) -> _Activated:
    dtype = _compute_dtype(q)
    group = v.shape[2] // q.shape[2]
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if o.use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    q = q * o.scale
    if group > 1:
        q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    g = log_decay(g, A_log, dt_bias, use_gate_in_kernel=o.use_gate_in_kernel, lower_bound=o.lower_bound)
    beta = beta_activation(
        beta, use_beta_sigmoid_in_kernel=o.use_beta_sigmoid_in_kernel, allow_neg_eigval=o.allow_neg_eigval
    )
    return _Activated(q, k, v, g, beta)


def _state_rows(state: Tensor | None, layout: _Layout, v: Tensor, K: int, dtype: torch.dtype, v_first: bool) -> Tensor:
    """A state argument as ``[N, HV, K, V]`` in the compute dtype, zeros where absent. Never the argument itself."""
    if state is None:
        return v.new_zeros(layout.sequences, v.shape[2], K, v.shape[3], dtype=dtype)
    state = state.mT if v_first else state
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _forward(
    layout: _Layout, x: _Activated, initial: Tensor, *, keep_entering: bool = False, keep_leaving: bool = False
) -> tuple[Tensor, _Scan]:
    """Outputs ``[B, T, HV, V]`` in the compute dtype, and the scan behind them."""
    chunks = _prepare(layout, *x)
    scan = _scan_forward(layout, chunks, initial, keep_entering=keep_entering, keep_leaving=keep_leaving)
    return layout.join(scan.inter + chunks.P @ scan.U), scan


def num_checkpoints(T: int, sequences: int, interval: int, *, packed: bool) -> int:
    """Rows of intermediate states a call returns: per sequence when dense, the most there can be when packed."""
    if packed:
        return (T + sequences * (interval - 1)) // interval
    return -(-T // interval)


def _checkpoints(layout: _Layout, entering: Tensor, every: int, v_first: bool) -> Tensor:
    """States that enter every ``every``-th chunk of a sequence, ``[B, NT, HV, ...]``; rows of no sequence are zero."""
    n, _, K, V = entering.shape
    if isinstance(layout, _DenseLayout):
        states = entering[::every].view(-(-n // every), layout.B, -1, K, V).transpose(0, 1)
    else:
        NT = num_checkpoints(layout.T, layout.sequences, layout.chunk * every, packed=True)
        kept = (layout.seq < layout.sequences) & (layout.position % every == 0)
        row = torch.where(kept, kept.cumsum(0) - 1, NT)
        states = entering.new_zeros(NT + 1, *entering.shape[1:])
        states.index_copy_(0, row, torch.where((row < NT)[:, None, None, None], entering, 0))
        states = states[:NT].unsqueeze(0)
    return (states.mT if v_first else states).contiguous()


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
    checkpoint_interval: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, final state and (with ``checkpoint_interval``) intermediate states of ``flashkda::chunk_kda``."""
    K, dtype = q.shape[-1], _compute_dtype(q)
    chunk = CHUNK
    while checkpoint_interval % chunk:
        chunk //= 2
    layout = _layout(q, cu_seqlens, chunk)
    initial = _state_rows(initial_state, layout, v, K, dtype, state_v_first)
    if q.numel() == 0 or v.numel() == 0:
        o, final, entering = v.new_zeros(v.shape), initial, initial.new_zeros(0, initial.shape[1], *initial.shape[2:])
    else:
        x = _activate(q, k, v, g, beta, A_log, dt_bias, options)
        o, scan = _forward(layout, x, initial, keep_entering=checkpoint_interval > 0)
        final, entering = scan.final, scan.entering
    states = None
    if checkpoint_interval:
        states = _checkpoints(layout, entering, checkpoint_interval // chunk, state_v_first)
    return o.to(v.dtype), (final.mT if state_v_first else final).contiguous(), states


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
) -> Gradients:
    """Gradients of :func:`chunk_kda` from the cotangents of its output and final state, either absent.

    The formulas are those of ``docs/backward.md``; the forward factors and states are recomputed.
    """
    K, HV, dtype = q.shape[-1], v.shape[2], _compute_dtype(q)
    layout = _layout(q, cu_seqlens, CHUNK)
    initial = _state_rows(initial_state, layout, v, K, dtype, state_v_first)
    dfinal = _state_rows(dht, layout, v, K, dtype, state_v_first)
    x = _activate(q, k, v, g, beta, A_log, dt_bias, options)
    chunks = _prepare(layout, *x)
    scan = _scan_forward(layout, chunks, initial, keep_entering=True)
    S, U = scan.entering, scan.U
    assert S is not None
    dO = layout.split(torch.zeros_like(x.v) if do is None else do.to(dtype))
    dW, dleaving, dinitial = _scan_backward(layout, chunks, dO, dfinal)

    # The triangular solve, then everything that is independent between chunks. With dW = beta * Y kept instead of Y,
    # beta's rows divide out: dN = beta * dL = -strict_lower(dW U^T), and dbeta is taken from Y itself.
    Kd, Kr = chunks.k * chunks.from_start, chunks.k * chunks.to_end
    dU = chunks.P.mT @ dO + Kr @ dleaving
    Y = _solve(chunks.L, dU, transpose=True)
    dP = (dO @ U.mT).tril()
    dL = -(Y @ U.mT).tril(-1)
    dN = chunks.beta * dL
    dbeta = (Y * (chunks.v - Kd @ S)).sum(-1, keepdim=True) + (dL * chunks.N).sum(-1, keepdim=True)
    dKr = U @ dleaving.mT
    dq = chunks.from_start * (dO @ S.mT)
    k_up = -chunks.from_start * (dW @ S.mT)
    k_down = chunks.to_end * dKr
    for level in chunks.levels:
        size, hi, lo = level.size, level.hi_decay, level.lo_decay
        k_lo, k_hi = _halves(chunks.k, size)
        q_hi = _halves(chunks.q, size)[1]
        dP_block, dN_block = _score_blocks(dP, size), _score_blocks(dN, size)
        right = k_lo * lo
        _halves(dq, size)[1].add_(hi * (dP_block @ right))
        _halves(k_up, size)[1].add_(hi * (dN_block @ right))
        _halves(k_down, size)[0].add_(lo * (dP_block.mT @ (q_hi * hi) + dN_block.mT @ (k_hi * hi)))
    dG = chunks.q * dq + chunks.k * (k_up - k_down)
    dG[:, :, -1] += (dKr * Kr).sum(-2) + (chunks.gamma * dleaving * S).sum(-1)
    dg = dG.flip(-2).cumsum(-2).flip(-2)
    diagonal = dP.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # a token reads itself undecayed: nothing for the gate
    dq = dq + diagonal * chunks.k
    dk = k_up + k_down + diagonal * chunks.q

    dq, dk, dv, dg = (layout.join(t) for t in (dq, dk, dW, dg))
    dbeta = layout.join(dbeta).squeeze(-1)
    dA_log, ddt_bias = None, None
    if options.use_gate_in_kernel:
        dg, dA_log, ddt_bias = _gate_backward(dg, g, A_log, dt_bias, x.g, options.lower_bound, layout)
    if options.use_beta_sigmoid_in_kernel:
        dbeta = dbeta * x.beta * (1 - x.beta / (2.0 if options.allow_neg_eigval else 1.0))
    group = HV // q.shape[2]
    if group > 1:
        dq, dk = (t.unflatten(2, (-1, group)).sum(3) for t in (dq, dk))
    dq = dq * options.scale
    if options.use_qk_l2norm_in_kernel:
        dq, dk = _l2norm_backward(dq, q), _l2norm_backward(dk, k)
    if isinstance(layout, _PackedLayout):  # the pieces above multiply by inputs, which may be NaN in padding rows
        outside = ~layout.token_valid[:, None]
        dbeta = dbeta.masked_fill(outside, 0)
        dq, dk, dg = (t.masked_fill(outside.unsqueeze(-1), 0) for t in (dq, dk, dg))
    dh0 = None if initial_state is None else (dinitial.mT if state_v_first else dinitial).contiguous()
    return Gradients(
        dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g.dtype), dbeta.to(beta.dtype), dA_log, ddt_bias, dh0
    )


def _l2norm_backward(dx_hat: Tensor, x: Tensor, eps: float = 1e-6) -> Tensor:
    x = x.to(dx_hat.dtype)
    r = torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    x_hat = x * r
    return r * (dx_hat - x_hat * (x_hat * dx_hat).sum(-1, keepdim=True))


def _gate_backward(
    dg: Tensor,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    decay: Tensor,
    lower_bound: float | None,
    layout: _Layout,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Through the gate: gradients of ``g``, ``A_log`` and ``dt_bias`` from those of the log decay."""
    z = g.to(dg.dtype)
    if dt_bias is not None:
        z = z + dt_bias.to(dg.dtype).view(g.shape[-2:])
    a = None if A_log is None else A_log.to(dg.dtype).exp().unsqueeze(-1)
    if lower_bound is not None:
        s = decay / lower_bound
        dscaled = dg * decay * (1 - s)  # the gradient of a * z
        dz = dscaled if a is None else dscaled * a
        dlog_a = dscaled * z if a is None else dz * z
    else:
        assert a is not None
        dz = -dg * a * torch.sigmoid(z)
        dlog_a = dg * decay
    if isinstance(layout, _PackedLayout):
        dz, dlog_a = (torch.where(layout.token_valid[:, None, None], t, 0) for t in (dz, dlog_a))
    dA_log = None if A_log is None else dlog_a.sum((0, 1, 3)).to(A_log.dtype)
    ddt_bias = None if dt_bias is None else dz.sum((0, 1)).to(dt_bias.dtype).view(dt_bias.shape)
    return dz, dA_log, ddt_bias


# ---------------------------------------------------------------------------------------------------------------------
# Paged state
# ---------------------------------------------------------------------------------------------------------------------


def _read_rows(pool: Tensor, slots: Tensor, valid: Tensor, dtype: torch.dtype, v_first: bool) -> Tensor:
    """Pool rows as ``[N, HV, K, V]`` in the compute dtype; zeros where not valid, whatever any row holds."""
    rows = pool.index_select(0, torch.where(valid, slots, 0))
    rows = torch.where(valid[:, None, None, None], rows, 0).to(dtype)
    return (rows.mT if v_first else rows).contiguous()


def _write_rows(pool: Tensor, slots: Tensor, valid: Tensor, states: Tensor, v_first: bool) -> None:
    """Write ``states [N, HV, K, V]`` to the valid slots and leave every other row as it is, without reading ``valid``.

    Indices must not depend on values, so entries that are not valid write again what the first valid one writes; where
    there is none, row 0 writes itself.
    """
    states = (states.mT if v_first else states).to(pool.dtype)
    any_valid = valid.any()
    source = torch.where(valid, torch.arange(valid.shape[0], device=valid.device), valid.to(torch.int8).argmax())
    slots = torch.where(any_valid, slots.index_select(0, source), 0)
    values = torch.where(any_valid, states.index_select(0, source), pool[:1])
    pool.index_copy_(0, slots, values)


def chunk_kda_paged(
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
    options: KdaOptions,
    *,
    state_v_first: bool,
    longest: int = CHUNK,
) -> Tensor:
    """Output of ``flashkda::chunk_kda_paged``; the pool's rows are advanced in place."""
    if q.numel() == 0 or v.numel() == 0 or state_pool.shape[0] == 0:
        return v.new_zeros(v.shape)
    dtype = _compute_dtype(q)
    layout = _layout(q, cu_seqlens, longest)
    slots = state_indices.long()
    valid = (slots >= 0) & (slots < state_pool.shape[0])
    started = valid if has_initial_state is None else valid & has_initial_state
    initial = _read_rows(state_pool, slots, started, dtype, state_v_first)
    x = _activate(q, k, v, g, beta, A_log, dt_bias, options)
    o, scan = _forward(layout, x, initial)
    if isinstance(layout, _PackedLayout):
        written, token_valid = valid & ~layout.empty, valid[layout.token_seq].view(1, -1, 1, 1)
    else:
        written, token_valid = valid, valid.view(-1, 1, 1, 1)
    _write_rows(state_pool, slots, written, scan.final, state_v_first)
    return torch.where(token_valid, o, 0).to(v.dtype)


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

    With one slot a sequence this is the chunk form, in chunks no longer than a sequence needs: one token makes it the
    recurrence itself. With a slot for each token it is the recurrence, and every state is written.
    """
    if state_indices.dim() == 1:
        tokens = q.shape[1] if cu_seqlens is None else -(-q.shape[1] // state_indices.shape[0])
        return chunk_kda_paged(
            q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias, cu_seqlens, None, options,
            state_v_first=state_v_first, longest=_chunk_length(tokens),
        )  # fmt: skip
    if q.numel() == 0 or v.numel() == 0 or state_pool.shape[0] == 0:
        return v.new_zeros(v.shape)
    N, width = state_indices.shape
    P, dtype = state_pool.shape[0], _compute_dtype(q)
    slots = state_indices.long()
    if num_accepted_tokens is None:
        start, valid = slots[:, 0], slots.new_ones(N, dtype=torch.bool)
    else:
        column = num_accepted_tokens.long() - 1
        valid = (column >= 0) & (column < width)
        start = slots.gather(1, torch.where(valid, column, 0).unsqueeze(1)).squeeze(1)
    valid = valid & (start >= 0) & (start < P)
    layout = _layout(q, cu_seqlens, 1)
    x = _activate(q, k, v, g, beta, A_log, dt_bias, options)
    initial = _read_rows(state_pool, start, valid, dtype, state_v_first)
    o, scan = _forward(layout, x, initial, keep_leaving=True)
    assert scan.leaving is not None
    leaving = scan.leaving.unflatten(1, (-1, v.shape[2])).flatten(0, 1)  # one state a token, [tokens, HV, K, V]
    if isinstance(layout, _PackedLayout):  # chunks of one token: chunk c holds the c-th token of a sequence
        seq, position = layout.seq.clamp(max=N - 1), layout.position
        used = layout.seq < N
        token_valid = valid[layout.token_seq].view(1, -1, 1, 1)
    else:
        T = q.shape[1]
        seq = torch.arange(N, device=q.device).repeat(T)
        position = torch.arange(T, device=q.device).repeat_interleave(N)
        used = torch.ones_like(seq, dtype=torch.bool)
        token_valid = valid.view(-1, 1, 1, 1)
    slot = slots[seq, position.clamp(0, width - 1)]
    written = used & valid[seq] & (position < width) & (slot >= 0) & (slot < P)
    _write_rows(state_pool, slot, written, leaving, state_v_first)
    return torch.where(token_valid, o, 0).to(v.dtype)
