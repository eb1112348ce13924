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

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashkda_ops.options import KdaOptions
from flashkda_ops.paged import on_rows, read_rows, safe_cu_seqlens, token_owner, valid_slots, write_rows
from flashkda_ops.reference import l2norm
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

CHUNK = 32


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

    def __init__(self, B: int, T: int, chunk: int) -> None:
        self.T, self.chunk = T, chunk
        self.chunks = -(-T // chunk)
        self.sequences = self.batch = B
        self.rows = self.chunks * chunk

    def take(self, x: Tensor, c0: int, c1: int) -> Tensor:
        """The tokens of chunks ``c0`` to ``c1``: ``[B, T, ...]`` to ``[B, rows, ...]``."""
        return x[:, c0 * self.chunk : c1 * self.chunk]

    def rows_of_chunks(self, x: Tensor, c0: int, c1: int) -> Tensor:
        """Taken tokens ``[B, rows, ...]`` with all rows of their chunks; those past ``T`` are zero."""
        missing = (c1 - c0) * self.chunk - x.shape[1]
        return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x

    def finish(self, x: Tensor) -> Tensor:
        """Rows of all chunks ``[B, rows, ...]`` to tokens ``[B, T, ...]``."""
        return x[:, : self.T].contiguous()


class _PackedLayout:
    """``[1, T, ...]`` with ``cu_seqlens``: the chunks of all sequences in one row, in order.

    ``chunks`` is the most that ``N`` sequences of ``T`` tokens can need; ``seq`` is ``N`` for those that they do not.
    """

    batch = 1

    def __init__(self, cu_seqlens: Tensor, T: int, chunk: int) -> None:
        N = cu_seqlens.shape[0] - 1
        self.T, self.chunk = T, chunk
        self.chunks = (T + N * (chunk - 1)) // chunk
        self.sequences = N
        self.rows = self.chunks * chunk
        device = cu_seqlens.device
        cu = safe_cu_seqlens(cu_seqlens, T)
        lengths = cu.diff()
        needed = (lengths + (chunk - 1)) // chunk
        ends = needed.cumsum(0)
        starts = ends - needed

        c = torch.arange(self.chunks, device=device)
        self.seq = torch.searchsorted(ends, c, right=True)
        within = self.seq.clamp(max=N - 1)
        self.position = c - starts[within]
        self.used = self.seq < N
        self.first = self.used & (self.position == 0)
        self.last = self.used & (c == ends[within] - 1)
        offset = self.position.unsqueeze(-1) * chunk + torch.arange(chunk, device=device)
        self.row_valid = (self.used.unsqueeze(-1) & (offset < lengths[within].unsqueeze(-1))).view(-1)
        self.row_token = torch.where(self.row_valid, (cu[within].unsqueeze(-1) + offset).view(-1), 0)

        t = torch.arange(T, device=device)
        owner = token_owner(cu, T)
        self.token_valid = (owner < N) & (t >= cu[0])
        self.token_seq = owner.clamp(max=N - 1)
        row = starts[self.token_seq] * chunk + t - cu[self.token_seq]
        self.token_row = torch.where(self.token_valid, row, 0)

    def take(self, x: Tensor, c0: int, c1: int) -> Tensor:
        """The tokens of chunks ``c0`` to ``c1``: ``[1, T, ...]`` to ``[1, rows, ...]``; rows of no token hold any."""
        return x[0].index_select(0, self.row_token[c0 * self.chunk : c1 * self.chunk]).unsqueeze(0)

    def rows_of_chunks(self, x: Tensor, c0: int, c1: int) -> Tensor:
        """Taken tokens ``[1, rows, X, D]`` with zeros in the rows of no token."""
        return torch.where(self.row_valid[c0 * self.chunk : c1 * self.chunk, None, None], x, 0)

    def finish(self, x: Tensor) -> Tensor:
        """Rows of all chunks ``[1, rows, ...]`` to tokens ``[1, T, ...]``; tokens of no sequence are zero."""
        x = x[0].index_select(0, self.token_row)
        return torch.where(self.token_valid.view(-1, *[1] * (x.dim() - 1)), x, 0).unsqueeze(0)


_Layout = _DenseLayout | _PackedLayout


def _layout(q: Tensor, cu_seqlens: Tensor | None, chunk: int) -> _Layout:
    if cu_seqlens is None:
        return _DenseLayout(q.shape[0], q.shape[1], chunk)
    return _PackedLayout(cu_seqlens, q.shape[1], chunk)


def _split(layout: _Layout, x: Tensor, c0: int, c1: int, out: Tensor | None = None) -> Tensor:
    """Taken tokens ``[B, rows, X, D]`` to chunks ``[c1 - c0, B * X, C, D]``; rows of no token are zero."""
    x = layout.rows_of_chunks(x, c0, c1).unflatten(1, (c1 - c0, layout.chunk)).permute(1, 0, 3, 2, 4)
    if out is None:  # never the argument itself, even where it is laid out alike
        return x.clone(memory_format=torch.contiguous_format).flatten(1, 2)
    out.unflatten(1, (layout.batch, -1)).copy_(x)
    return out


def _merge(layout: _Layout, x: Tensor, rows: int) -> Tensor:
    """Chunks ``[n, B * X, C, D]`` back to ``[B, rows, X, D]``, the inverse of :func:`_split`."""
    return _by_rows(layout, x).flatten(1, 2)[:, :rows]


def _by_rows(layout: _Layout, x: Tensor) -> Tensor:
    """Chunks ``[n, B * X, C, D]`` as a view ``[B, n, C, X, D]``."""
    return x.unflatten(1, (layout.batch, -1)).permute(1, 0, 3, 2, 4)


def _segments(layout: _Layout, v: Tensor, K: int) -> list[tuple[int, int]]:
    """Runs of chunks that are worked on together, so that a factor takes 2 MiB on a CPU, 64 MiB else."""
    elements = layout.batch * v.shape[2] * layout.chunk * max(K, v.shape[3])
    step = max(1, (1 << 19 if v.device.type == "cpu" else 1 << 24) // elements)
    return [(c, min(c + step, layout.chunks)) for c in range(0, layout.chunks, step)]


# ---------------------------------------------------------------------------------------------------------------------
# The factors of a chunk
# ---------------------------------------------------------------------------------------------------------------------


class _Level(NamedTuple):
    """Blocks of ``size`` tokens: their second half reads their first half through the midpoint between them."""

    size: int
    hi_decay: Tensor  # [n, M, C / size, size / 2, K]: from the midpoint to each token of the second half
    lo_decay: Tensor  # [n, M, C / size, size / 2, K]: from each token of the first half to the midpoint


def _levels(prefix: Tensor, suffix: Tensor) -> Iterator[_Level]:
    """Decays between tokens of a chunk, level by level from pairs of tokens up to the whole chunk.

    ``prefix`` comes in as the log decays ``g [n, M, C, K]`` and ``suffix`` as zeros. Both grow in place: at a level of
    blocks of ``size`` tokens they are the sums from a half block's start to each token (its own included), and from
    each token (its own excluded) to the half block's end. In the end they are those of the whole chunk.

    A level's decays are overwritten by those of the next: fresh memory costs more here than arithmetic.
    """
    hi, lo = prefix.new_empty(2, prefix.numel() // 2)
    size = 2
    while size <= prefix.shape[2]:
        prefix_lo, prefix_hi = _halves(prefix, size)
        suffix_lo, _ = _halves(suffix, size)
        shape = prefix_hi.shape
        yield _Level(size, _exp(prefix_hi, hi.view(shape)), _exp(suffix_lo, lo.view(shape)))
        suffix_lo += prefix_hi[..., -1:, :]
        prefix_hi += prefix_lo[..., -1:, :]
        size *= 2


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and second halves of blocks of ``size`` rows: views ``[n, M, C / size, size / 2, ...]``."""
    n, M, C, *rest = x.shape
    lo, hi = x.view(n, M, C // size, 2, size // 2, *rest).unbind(3)
    return lo, hi


def _score_blocks(scores: Tensor, size: int) -> Tensor:
    """Blocks (second half, first half) of ``[n, M, C, 2, C]``: a view ``[n, M, C / size, size / 2, 2, size / 2]``."""
    n, M, C, _, _ = scores.shape
    half = size // 2
    blocks = scores.view(n, M, C // size, size, 2, C // size, size).diagonal(dim1=2, dim2=5)
    return blocks[:, :, half:, :, :half].permute(0, 1, 5, 2, 3, 4)


def _by_tokens(x: Tensor, decay: Tensor, out: Tensor) -> Tensor:
    """``x [..., 2, K]`` times its tokens' ``decay [..., K]``, both rows of a token under each other: ``[..., K]``."""
    return torch.mul(x, decay.unsqueeze(-2), out=out.view(x.shape)).flatten(-3, -2)


def _inverse(L: Tensor) -> Tensor:
    """``(I + L)^-1`` for strictly lower ``L``, by substitution."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True).contiguous()


def _exp(x: Tensor, out: Tensor) -> Tensor:
    """``exp(x)``, zero where it is far below rounding: CPUs are many times slower on subnormal numbers."""
    tiny = 1e-290 if x.dtype == torch.float64 else 1e-30
    return F.threshold(torch.exp(x, out=out), tiny, 0.0, inplace=True)


@dataclass
class _Chunks:
    """Tokens in chunks, with the factors that both directions need. Shapes ``[n, M, C, .]``, ``M = B * HV``."""

    qk: Tensor  # [n, M, C, 2, K]: a token's query (scaled, and normalised if asked) and key, for one product with both
    v: Tensor
    beta: Tensor  # [n, M, C, 1]
    from_start: Tensor  # exp(G)
    to_end: Tensor  # exp(G_C - G)
    gamma: Tensor  # [n, M, K, 1]: exp(G_C)
    Kd: Tensor
    Qd: Tensor
    Kr: Tensor
    PN: Tensor  # [n, M, C, 2, C]: a token's rows of P, lower Qd Ki^T, and of N, strictly lower Kd Ki^T
    T: Tensor  # [n, M, C, C]: (I + diag(beta) N)^-1
    A: Tensor  # T diag(beta)
    AV: Tensor
    AKd: Tensor

    @property
    def q(self) -> Tensor:
        return self.qk[..., 0, :]

    @property
    def k(self) -> Tensor:
        return self.qk[..., 1, :]

    @property
    def P(self) -> Tensor:
        return self.PN[..., 0, :]

    @property
    def N(self) -> Tensor:
        return self.PN[..., 1, :]


class _Inputs(NamedTuple):
    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV, K]
    beta: Tensor  # [B, T, HV, 1]
    A_log: Tensor | None
    dt_bias: Tensor | None


class _Activated(NamedTuple):
    q: Tensor  # [B, rows, HV, K]
    k: Tensor  # [B, rows, HV, K]
    v: Tensor
    g: Tensor  # log decay
    beta: Tensor


def _take(layout: _Layout, x: _Inputs, c0: int, c1: int) -> _Inputs:
    q, k, v, g, beta = (layout.take(t, c0, c1) for t in x[:5])
    return _Inputs(q, k, v, g, beta, x.A_log, x.dt_bias)


def _activate(x: _Inputs, o: KdaOptions) -> _Activated:
    """Norms and gates, in the compute dtype; queries and keys repeated for their value heads.

    Contiguous first: torch rounds functions and sums of strided tensors differently.
    """
    dtype = state_dtype(x.q)
    q, k, v, g, beta = (t.to(dtype).contiguous() for t in x[:5])
    if o.use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    group = v.shape[2] // q.shape[2]
    if group > 1:
        q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    if o.use_gate_in_kernel:
        z, a = _gate_input(g, x)
        if o.lower_bound is not None:
            g = _sigmoid(z if a is None else a * z).mul_(o.lower_bound)
        else:
            assert a is not None
            g = _softplus(z).mul_(-a)
    if o.use_beta_sigmoid_in_kernel:
        beta = _sigmoid(beta).mul_(2.0 if o.allow_neg_eigval else 1.0)
    return _Activated(q, k, v, g, beta)


def _gate_input(g: Tensor, x: _Inputs) -> tuple[Tensor, Tensor | None]:
    """``g + dt_bias`` and ``exp(A_log)``."""
    z = g if x.dt_bias is None else g + x.dt_bias.to(g.dtype).view(g.shape[-2:])
    return z, None if x.A_log is None else x.A_log.to(g.dtype).exp().unsqueeze(-1)


# torch.sigmoid and softplus round an element by its place in the tensor (vector or remainder); these do not.


def _sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_()


def _softplus(x: Tensor) -> Tensor:
    return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0))


def _prepare(layout: _Layout, x: _Activated, scale: float, c0: int, c1: int) -> _Chunks:
    v, beta = _split(layout, x.v, c0, c1), _split(layout, x.beta, c0, c1)
    prefix = _split(layout, x.g, c0, c1)
    suffix = torch.zeros_like(prefix)
    n, M, C, K = prefix.shape
    qk = prefix.new_empty(n, M, C, 2, K)
    q, k = (_split(layout, t, c0, c1, out) for t, out in zip((x.q, x.k), qk.unbind(3), strict=True))
    q *= scale
    PN = k.new_zeros(n, M, C, 2, C)
    scratch = torch.empty_like(prefix)
    PN[..., 0, :].diagonal(dim1=-2, dim2=-1).copy_(torch.mul(q, k, out=scratch).sum(-1))
    for size, hi, lo in _levels(prefix, suffix):
        scores = _by_tokens(_halves(qk, size)[1], hi, scratch) @ lo.mul_(_halves(k, size)[0]).mT
        _score_blocks(PN, size).copy_(scores.unflatten(-2, (-1, 2)))
    from_start, to_end = _exp(prefix, prefix), _exp(suffix, suffix)
    Kd = k * from_start
    T = _inverse(beta * PN[..., 1, :])
    A = T * beta.mT
    gamma = from_start[:, :, -1].unsqueeze(-1)
    return _Chunks(
        qk, v, beta, from_start, to_end, gamma, Kd, q * from_start, k * to_end, PN, T, A, A @ v, A @ Kd
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The scans
# ---------------------------------------------------------------------------------------------------------------------


class _StateRows:
    """The running state of a scan, and the sequences' own rows ``[N, HV, K, V]``.

    Dense layouts carry ``[B * HV, K, V]`` for all sequences at once. Packed ones carry ``[HV, K, V]``, take over a
    sequence's row where it begins, and store into it after every chunk, so that the last one remains. Chunks of no
    sequence have a row of their own behind the others.
    """

    def __init__(self, layout: _Layout, rows: Tensor, *, reverse: bool = False) -> None:
        self.shape = rows.shape
        if isinstance(layout, _PackedLayout):
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
        return self.state.view(self.shape) if self.seq is None else self.rows[:-1]


def _scan_forward(x: _Chunks, rows: _StateRows, c0: int, entering: Tensor, leaving: Tensor | None) -> Tensor:
    """Advance the state over the chunks ``x``, the first of them chunk ``c0`` of the call.

    Fills ``entering [n, M, K, V]`` (and ``leaving``) with the state before (and after) each chunk and turns ``AV`` into
    ``U [n, M, C, V]``, which it returns. The next chunk starts from the state as ``leaving`` holds it, in its dtype.
    """
    states = [*entering.unbind(0), torch.empty_like(entering[0])]
    factors = zip(x.AV.unbind(0), x.AKd.unbind(0), x.gamma.unbind(0), x.Kr.mT.unbind(0), strict=True)
    for c, (U, AKd, gamma, Kr_t) in enumerate(factors):
        S = rows.enter(c0 + c, states[c])
        U.baddbmm_(AKd, S, alpha=-1)
        after = torch.mul(S, gamma, out=states[c + 1]).baddbmm_(Kr_t, U)
        if leaving is not None:
            leaving[c] = after
            if leaving.dtype != after.dtype:
                after.copy_(leaving[c])
        rows.leave(c0 + c, after)
    return x.AV


def _scan_backward(x: _Chunks, dO: Tensor, rows: _StateRows, c0: int) -> tuple[Tensor, Tensor]:
    """The forward scan reversed. Returns ``dW`` and the gradient of each chunk's leaving state."""
    n, M, _, K = x.k.shape
    dW, dleaving = (x.P @ x.A).mT @ dO, x.v.new_empty(n, M, K, x.v.shape[-1])
    reader, seed, Kd_t = x.A.mT @ x.Kr, x.Qd.mT @ dO, x.Kd.mT
    for c in reversed(range(n)):
        dS = rows.enter(c0 + c, dleaving[c])
        dW[c].baddbmm_(reader[c], dS)
        rows.leave(c0 + c, torch.addcmul(seed[c], dS, x.gamma[c]).baddbmm_(Kd_t[c], dW[c], alpha=-1))
    return dW, dleaving


class _Scan(NamedTuple):
    o: Tensor  # [B, T, HV, V], in the compute dtype
    final: Tensor  # [N, HV, K, V]


def _forward(
    layout: _Layout,
    x: _Inputs,
    initial: Tensor,
    options: KdaOptions,
    *,
    entering: Tensor | None = None,
    leaving: Tensor | None = None,
) -> _Scan:
    """The whole forward pass; ``entering`` and ``leaving [chunks, B * HV, K, V]`` are filled where they are given."""
    HV, K, V = initial.shape[1:]
    o = initial.new_empty(layout.batch, layout.rows, HV, V)
    states = _StateRows(layout, initial)
    for c0, c1 in _segments(layout, x.v, K):
        chunks = _prepare(layout, _activate(_take(layout, x, c0, c1), options), options.scale, c0, c1)
        S = initial.new_empty(c1 - c0, layout.batch * HV, K, V) if entering is None else entering[c0:c1]
        U = _scan_forward(chunks, states, c0, S, None if leaving is None else leaving[c0:c1])
        o_chunks = (chunks.Qd @ S).flatten(0, 1).baddbmm_(chunks.P.flatten(0, 1), U.flatten(0, 1)).view_as(U)
        rows = o[:, c0 * layout.chunk : c1 * layout.chunk].unflatten(1, (c1 - c0, layout.chunk))
        rows.copy_(_by_rows(layout, o_chunks))
    return _Scan(layout.finish(o), states.result())


# ---------------------------------------------------------------------------------------------------------------------
# The ops
# ---------------------------------------------------------------------------------------------------------------------


def _initial_rows(state: Tensor | None, layout: _Layout, x: _Inputs, v_first: bool) -> Tensor:
    """A state argument as ``[N, HV, K, V]`` in the compute dtype, zeros where absent. Never the argument itself."""
    K, dtype = x.q.shape[-1], state_dtype(x.q)
    if state is None:
        return x.v.new_zeros(layout.sequences, x.v.shape[2], K, x.v.shape[3], dtype=dtype)
    state = state.mT if v_first else state
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _in_layout(states: Tensor, v_first: bool) -> Tensor:
    """States from K first, as they are computed, to the caller's layout, or back."""
    return (states.mT if v_first else states).contiguous()


def num_checkpoints(T: int, sequences: int, interval: int, *, packed: bool) -> int:
    """Rows of intermediate states a call returns: per sequence when dense, the most there can be when packed."""
    if packed:
        return (T + sequences * (interval - 1)) // interval
    return -(-T // interval)


def _checkpoints(layout: _Layout, entering: Tensor, every: int, v_first: bool) -> Tensor:
    """States that enter every ``every``-th chunk of a sequence, ``[B, NT, HV, ...]``; rows of no sequence are zero."""
    n, _, K, V = entering.shape
    if isinstance(layout, _DenseLayout):
        states = entering[::every].view(-(-n // every), layout.batch, -1, K, V).transpose(0, 1)
    else:
        NT = num_checkpoints(layout.T, layout.sequences, layout.chunk * every, packed=True)
        kept = layout.used & (layout.position % every == 0)
        row = torch.where(kept, kept.cumsum(0) - 1, NT)
        states = entering.new_zeros(NT + 1, *entering.shape[1:]).index_copy_(0, row, entering)[:NT].unsqueeze(0)
    return _in_layout(states, v_first)


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
    longest_chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, final state and (with ``checkpoint_interval``) intermediate states of ``flashkda::chunk_kda``."""
    x = _Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    chunk = math.gcd(longest_chunk, checkpoint_interval)
    layout = _layout(q, cu_seqlens, chunk)
    initial = _initial_rows(initial_state, layout, x, state_v_first)
    entering = None
    if checkpoint_interval:
        entering = initial.new_empty(layout.chunks, layout.batch * v.shape[2], *initial.shape[2:])
    if q.numel():
        o, final = _forward(layout, x, initial, options, entering=entering)
    else:
        o, final = v.new_zeros(v.shape), initial
        entering = None if entering is None else entering.zero_()
    states = None if entering is None else _checkpoints(layout, entering, checkpoint_interval // chunk, state_v_first)
    return o.to(v.dtype), _in_layout(final, state_v_first), states


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
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`chunk_kda`, and the states after ``offsets [N, C]`` tokens of each sequence, ``[N, C, HV, ...]``.

    Offsets are in any order; those outside of the sequence are as its start or end. A sequence is cut into pieces where
    a state is asked for: no chunk spans two of them, and the state goes on from one to the next.
    """
    (B, T), N = q.shape[:2], offsets.shape[0]
    if cu_seqlens is None:
        cu = torch.arange(0, B * T + 1, T, device=q.device)
        q, k, v, g, beta = (x.reshape(1, B * T, *x.shape[2:]) for x in (q, k, v, g, beta))
    else:
        cu = safe_cu_seqlens(cu_seqlens, T)
    starts, lengths = cu[:-1, None], cu.diff().unsqueeze(1)
    cuts, order = (starts + torch.minimum(offsets.long().clamp(min=0), lengths)).sort(1)
    bounds = torch.cat((starts, cuts, starts + lengths), 1)  # of the pieces of each sequence, [N, C + 2]
    layout = _PackedLayout(torch.cat((cu[:1], bounds[:, 1:].flatten())), q.shape[1], CHUNK)
    # A chunk loads its piece's row where a sequence begins, and there alone. So every piece that may be the first one
    # with tokens has the sequence's initial state in its row.
    begins_sequence = (bounds[:, :-1] == starts).flatten()
    layout.first &= begins_sequence[layout.seq.clamp(max=begins_sequence.shape[0] - 1)]
    x = _Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    initial = _in_layout(initial_state, state_v_first)
    o, after = _forward(layout, x, initial.repeat_interleave(bounds.shape[1] - 1, 0), options)
    # An empty piece leaves what the last one with tokens left, or the initial state, which its own row still holds.
    piece = torch.arange(after.shape[0], device=q.device).view(N, -1)
    latest = torch.where(bounds.diff() > 0, piece, -1).cummax(1).values
    after = after.index_select(0, torch.where(latest >= 0, latest, piece).flatten()).unflatten(0, (N, -1))
    after = _in_layout(after, state_v_first)
    states = torch.empty_like(after[:, :-1]).scatter_(1, order[..., None, None, None].expand_as(after[:, :-1]), after)
    return o.to(v.dtype).view(B, T, *o.shape[2:]), after[:, -1].contiguous(), states


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
    x = _Inputs(k, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)  # no output is computed: any query will do
    layout = _layout(k, cu_seqlens, CHUNK)
    HV, V, K = *v.shape[2:], k.shape[-1]
    rows = v.new_zeros(layout.sequences, HV, K, V + K, dtype=state_dtype(k))
    rows[..., V:].diagonal(dim1=-2, dim2=-1).fill_(1)
    if k.numel():
        states = _StateRows(layout, rows)
        for c0, c1 in _segments(layout, v, K):
            chunks = _prepare(layout, _activate(_take(layout, x, c0, c1), options), options.scale, c0, c1)
            chunks.AV = F.pad(chunks.AV, (0, K))
            _scan_forward(chunks, states, c0, rows.new_empty(c1 - c0, layout.batch * HV, K, V + K), None)
        rows = states.result()
    B, M = (_in_layout(t, state_v_first) for t in rows.split((V, K), -1))
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
) -> Gradients:
    """Gradients of :func:`chunk_kda` from the cotangents of its output and final state, either absent.

    The formulas are those of ``docs/backward.md``. The states between chunks are recomputed and kept, everything else
    is recomputed where it is used.
    """
    x = _Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    dtype = state_dtype(q)
    layout = _layout(q, cu_seqlens, CHUNK)
    dstates = _StateRows(layout, _initial_rows(dht, layout, x, state_v_first), reverse=True)
    dA_log = None if A_log is None else torch.zeros_like(A_log, dtype=dtype)
    ddt_bias = None if dt_bias is None else dt_bias.new_zeros(v.shape[2], q.shape[-1], dtype=dtype)
    dq, dk, dv, dg, dbeta = (t.new_empty(layout.batch, layout.rows, *t.shape[2:]) for t in x[:5])
    grads = _Inputs(dq, dk, dv, dg, dbeta, dA_log, ddt_bias)
    if q.numel():
        initial = _initial_rows(initial_state, layout, x, state_v_first)
        entering = initial.new_empty(layout.chunks, layout.batch * v.shape[2], *initial.shape[2:])
        _forward(layout, x, initial, options, entering=entering)
        for c0, c1 in reversed(_segments(layout, v, q.shape[-1])):
            taken = _take(layout, x, c0, c1)
            dtaken = torch.zeros_like(taken.v) if do is None else layout.take(do, c0, c1)
            _segment_backward(layout, taken, dtaken, entering[c0:c1], dstates, options, grads, c0, c1)
    dq, dk, dv, dg, dbeta = (layout.finish(t) for t in grads[:5])
    if A_log is not None and dA_log is not None:
        dA_log = dA_log.to(A_log.dtype)
    if dt_bias is not None and ddt_bias is not None:
        ddt_bias = ddt_bias.to(dt_bias.dtype).view(dt_bias.shape)
    dh0 = None
    if initial_state is not None:
        dh0 = _in_layout(dstates.result(), state_v_first)
    return Gradients(dq, dk, dv, dg, dbeta.squeeze(-1), dA_log, ddt_bias, dh0)


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
) -> Tensor:
    """Of :func:`chunk_kda_backward`, the gradient of the initial state alone: it needs no state of the forward pass."""
    x = _Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    layout = _layout(q, cu_seqlens, CHUNK)
    dstates = _StateRows(layout, _initial_rows(dht, layout, x, state_v_first), reverse=True)
    if q.numel():
        for c0, c1 in reversed(_segments(layout, v, q.shape[-1])):
            taken = _take(layout, x, c0, c1)
            dtaken = torch.zeros_like(taken.v) if do is None else layout.take(do, c0, c1)
            chunks = _prepare(layout, _activate(taken, options), options.scale, c0, c1)
            _scan_backward(chunks, _split(layout, dtaken.to(chunks.v.dtype), c0, c1), dstates, c0)
    return _in_layout(dstates.result(), state_v_first)


def _segment_backward(
    layout: _Layout,
    taken: _Inputs,
    do: Tensor,
    S: Tensor,
    dstates: _StateRows,
    options: KdaOptions,
    grads: _Inputs,
    c0: int,
    c1: int,
) -> None:
    """One segment of the backward pass: fills its rows of ``grads`` and adds to those of ``A_log`` and ``dt_bias``."""
    activated = _activate(taken, options)
    x = _prepare(layout, activated, options.scale, c0, c1)
    dO = _split(layout, do.to(x.v.dtype), c0, c1)
    U = x.AV - x.AKd @ S
    dW, dleaving = _scan_backward(x, dO, dstates, c0)

    Y = x.T.mT @ (x.P.mT @ dO + x.Kr @ dleaving)
    dPN = torch.stack(((dO @ U.mT), (dW @ U.mT).neg_()), 3)  # only its parts below the diagonal are read
    dbeta = (Y * (x.v - x.Kd @ S - x.N @ U)).sum(-1, keepdim=True)
    dKr = U @ dleaving.mT
    up = torch.stack((dO @ S.mT, (dW @ S.mT).neg_()), 3).mul_(x.from_start.unsqueeze(3))  # of q, and of k from before
    k_down = x.to_end * dKr  # of k from behind
    g = _split(layout, activated.g, c0, c1)
    scratch = torch.empty_like(g)
    for size, hi, lo in _levels(g, torch.zeros_like(g)):
        (qk_lo, qk_hi), blocks = _halves(x.qk, size), _score_blocks(dPN, size).flatten(3, 4)
        read = (blocks @ (qk_lo[..., 1, :] * lo)).unflatten(-2, (-1, 2))
        _halves(up, size)[1].addcmul_(read, hi.unsqueeze(-2))
        _halves(k_down, size)[0].addcmul_(blocks.mT @ _by_tokens(qk_hi, hi, scratch), lo)
    dq, k_up = up.unbind(3)
    dG = x.q * dq + x.k * (k_up - k_down)
    dG[:, :, -1] += (dKr * x.Kr).sum(-2) + (x.gamma * dleaving * S).sum(-1)
    dg = dG.flip(-2).cumsum(-2).flip(-2)
    # A token reads itself undecayed, which is nothing to the gate.
    diagonal = dPN[..., 0, :].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dq = dq + diagonal * x.k
    dk = k_up + k_down + diagonal * x.q

    rows = taken.v.shape[1]
    dq, dk, dv, dg, dbeta = (_merge(layout, t, rows) for t in (dq, dk, dW, dg, dbeta))
    if options.use_gate_in_kernel:
        valid = None
        if isinstance(layout, _PackedLayout):
            valid = layout.row_valid[c0 * layout.chunk : c1 * layout.chunk, None, None]
        dg, dA_log, ddt_bias = _gate_backward(dg, taken, activated.g, options.lower_bound, valid)
        for total, part in ((grads.A_log, dA_log), (grads.dt_bias, ddt_bias)):
            if total is not None and part is not None:
                total += part
    if options.use_beta_sigmoid_in_kernel:
        dbeta = dbeta * activated.beta * (1 - activated.beta / (2.0 if options.allow_neg_eigval else 1.0))
    group = taken.v.shape[2] // taken.q.shape[2]
    if group > 1:
        dq, dk = (t.unflatten(2, (-1, group)).sum(3) for t in (dq, dk))
    dq = dq * options.scale
    if options.use_qk_l2norm_in_kernel:
        dq, dk = _l2norm_backward(dq, taken.q), _l2norm_backward(dk, taken.k)
    start = c0 * layout.chunk
    for out, part in zip(grads[:5], (dq, dk, dv, dg, dbeta), strict=True):
        out[:, start : start + rows] = part


def _l2norm_backward(dx_hat: Tensor, x: Tensor, eps: float = 1e-6) -> Tensor:
    x = x.to(dx_hat.dtype).contiguous()
    r = torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    x_hat = x * r
    return r * (dx_hat - x_hat * (x_hat * dx_hat).sum(-1, keepdim=True))


def _gate_backward(
    dg: Tensor, x: _Inputs, decay: Tensor, lower_bound: float | None, valid: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Through the gate: gradients of ``g``, ``A_log`` and ``dt_bias`` from that of the log decay ``decay``.

    ``valid`` marks the rows that hold a token; the others must not reach the sums.
    """
    z, a = _gate_input(x.g.to(dg.dtype).contiguous(), x)
    if lower_bound is not None:
        dscaled = dg * decay * (1 - decay / lower_bound)  # the gradient of a * z
        dz = dscaled if a is None else dscaled * a
        dlog_a = dz * z
    else:
        assert a is not None
        dz = -dg * a * _sigmoid(z)
        dlog_a = dg * decay
    if valid is not None:
        dz, dlog_a = torch.where(valid, dz, 0), torch.where(valid, dlog_a, 0)
    return dz, dlog_a.sum((0, 1, 3)), dz.sum((0, 1))


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
    K, T = q.shape[-1], q.shape[1]
    if state_indices.dim() == 1:
        tokens = T if cu_seqlens is None else -(-T // state_indices.shape[0])

        def forward(initial: Tensor) -> tuple[Tensor, Tensor]:
            o, final, _ = chunk_kda(
                q, k, v, g, beta, A_log, dt_bias, initial, cu_seqlens, options,
                state_v_first=state_v_first, longest_chunk=min(CHUNK, 1 << max(0, tokens - 1).bit_length()),
            )  # fmt: skip
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
    x = _Inputs(q, k, v, g, beta.unsqueeze(-1), A_log, dt_bias)
    layout = _layout(q, cu_seqlens, 1)
    initial = read_rows(state_pool, start, valid, state_dtype(q))
    initial = _in_layout(initial, state_v_first)
    leaving = state_pool.new_empty(layout.chunks, layout.batch * v.shape[2], K, v.shape[3])
    o, _ = _forward(layout, x, initial, options, leaving=leaving)
    leaving = leaving.unflatten(1, (layout.batch, -1)).flatten(0, 1)  # one state a token, [tokens, HV, K, V]
    if isinstance(layout, _PackedLayout):  # chunks of one token: chunk c holds token `position` of its sequence
        seq, position, used = layout.seq.clamp(max=N - 1), layout.position, layout.used
        token_valid = valid[layout.token_seq].view(1, -1, 1, 1)
    else:
        seq = torch.arange(N, device=q.device).repeat(T)
        position = torch.arange(T, device=q.device).repeat_interleave(N)
        used = torch.ones_like(seq, dtype=torch.bool)
        token_valid = valid.view(-1, 1, 1, 1)
    slot = slots[seq, position.clamp(0, width - 1)]
    written = used & valid[seq] & (position < width) & valid_slots(slot, state_pool)
    write_rows(state_pool, slot, written, leaving.mT if state_v_first else leaving)
    return torch.where(token_valid, o, 0).to(v.dtype)
