"""Tokens in chunks, and what the tokens of a chunk are to each other: what the scans of the portable path are made of.

Symbols are those of the chunk form in ``docs/numerics.md``; states are K-first (``[K, V]``) in here. Two things keep it
exact in every gate regime:

* No exponential of a positive number is taken, and no difference of two cumulative sums. The decay between two tokens
  of a chunk is split at a midpoint of a binary tree over the chunk, so each factor is the exponential of a sum of log
  decays (``levels``); a decay that underflows does so alone.
* The triangular system is solved by substitution, never through a series of powers, which cancels for parallel keys.

Nothing here reads the value of a tensor on the host: which tokens a chunk holds is index arithmetic on the device, and
the number of chunks follows from the shapes alone. So the portable path can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashkda_ops.options import KdaOptions
from flashkda_ops.paged import safe_cu_seqlens, token_owner
from flashkda_ops.reference import l2norm
from flashkda_ops.validation import state_dtype

__all__ = [
    "CHUNK",
    "Activated",
    "AlignedLayout",
    "Chunks",
    "Crossing",
    "Crossings",
    "DenseLayout",
    "Inputs",
    "Layout",
    "activate",
    "allocate",
    "as_bits",
    "by_rows",
    "decay",
    "halves",
    "pair_gradients",
    "prepare",
    "product",
    "product_t",
    "running_sums",
    "runs",
    "select",
    "split",
    "store",
    "store_gradients",
    "take",
]

CHUNK = 32


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to chunks and back
# ---------------------------------------------------------------------------------------------------------------------


class DenseLayout:
    """``[B, T, ...]``, every row a sequence: chunk ``c`` of all rows advances at once."""

    def __init__(self, B: int, T: int, chunk: int) -> None:
        self.T, self.chunk = T, chunk
        self.chunks = -(-T // chunk)
        self.sequences = self.batch = B
        self.rows = T  # of the tensors that results are stored in

    def take(self, x: Tensor, c0: int, c1: int) -> Tensor:
        """The tokens of chunks ``c0`` to ``c1``: ``[B, T, ...]`` to ``[B, rows, ...]``."""
        return x[:, c0 * self.chunk : c1 * self.chunk]

    def fill(self, x: Tensor, c0: int, c1: int) -> Tensor:
        """Taken tokens ``[B, rows, X, D]`` with all rows of their chunks; those past ``T`` are zero."""
        missing = (c1 - c0) * self.chunk - x.shape[1]
        return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x

    def is_token(self, c0: int, c1: int) -> Tensor | None:
        """Which of the taken rows hold a token of a sequence ``[rows]``; None where all do."""
        return None

    def finish(self, x: Tensor) -> Tensor:
        """Stored rows to tokens ``[B, T, ...]``; tokens of no sequence are zero."""
        return x


class AlignedLayout:
    """``[1, T, ...]`` with ``cu_seqlens``: the chunks of all sequences in one row, in order, none of two sequences.

    ``chunks`` is the most that ``N`` sequences of ``T`` tokens can need; ``seq`` is ``N`` for those that they do not.
    """

    batch = 1

    def __init__(self, cu_seqlens: Tensor, T: int, chunk: int) -> None:
        N = cu_seqlens.shape[0] - 1
        self.T, self.chunk = T, chunk
        self.chunks = (T + min(N, T) * (chunk - 1)) // chunk
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

    def fill(self, x: Tensor, c0: int, c1: int) -> Tensor:
        """Taken tokens ``[1, rows, X, D]`` with zeros in the rows of no token."""
        return torch.where(self.is_token(c0, c1).view(-1, 1, 1), x, 0)

    def is_token(self, c0: int, c1: int) -> Tensor:
        return self.row_valid[c0 * self.chunk : c1 * self.chunk]

    def finish(self, x: Tensor) -> Tensor:
        x = x.index_select(1, self.token_row)
        return torch.where(self.token_valid.view(-1, *[1] * (x.dim() - 2)), x, 0)


Layout = DenseLayout | AlignedLayout


def allocate(layout: Layout, like: Tensor, *shape: int) -> Tensor:
    """Memory for the results of all chunks, ``[B, rows, *shape]``."""
    return like.new_empty(layout.batch, layout.rows, *shape)


def split(layout: Layout, x: Tensor, c0: int, c1: int, out: Tensor | None = None) -> Tensor:
    """Taken tokens ``[B, rows, X, D]`` to chunks ``[c1 - c0, B * X, C, D]``; rows of no token are zero."""
    x = layout.fill(x, c0, c1).unflatten(1, (c1 - c0, layout.chunk)).permute(1, 0, 3, 2, 4)
    if out is None:  # never the argument itself, even where it is laid out alike
        return x.clone(memory_format=torch.contiguous_format).flatten(1, 2)
    out.unflatten(1, (layout.batch, -1)).copy_(x)
    return out


def by_rows(layout: Layout, x: Tensor) -> Tensor:
    """Chunks ``[n, B * X, C, D]`` as a view ``[B, n, C, X, D]``."""
    return x.unflatten(1, (layout.batch, -1)).permute(1, 0, 3, 2, 4)


def _merge(layout: Layout, x: Tensor, rows: int) -> Tensor:
    """Chunks ``[n, B * X, C, D]`` back to ``[B, rows, X, D]``, the inverse of :func:`split`."""
    return by_rows(layout, x).flatten(1, 2)[:, :rows]


def store(layout: Layout, x: Tensor, out: Tensor, c0: int) -> None:
    """Put chunks ``[n, B * X, C, D]``, the first of them chunk ``c0``, in their rows of ``out``."""
    x, C = by_rows(layout, x), layout.chunk
    rows = out[:, c0 * C : (c0 + x.shape[1]) * C]
    whole = rows.shape[1] // C
    rows[:, : whole * C].unflatten(1, (whole, C)).copy_(x[:, :whole])
    if whole < x.shape[1]:  # the last chunk of a dense layout
        rows[:, whole * C :].copy_(x[:, whole, : rows.shape[1] - whole * C])


def runs(layout: Layout, v: Tensor, K: int) -> list[tuple[int, int]]:
    """Runs of chunks that are worked on together, so that a factor takes 2 MiB on a CPU, 64 MiB else."""
    elements = layout.batch * v.shape[2] * layout.chunk * max(K, v.shape[3])
    step = max(1, (1 << 19 if v.device.type == "cpu" else 1 << 24) // elements)
    return [(c, min(c + step, layout.chunks)) for c in range(0, layout.chunks, step)]


# ---------------------------------------------------------------------------------------------------------------------
# The tree over a chunk
# ---------------------------------------------------------------------------------------------------------------------


class Crossing(NamedTuple):
    """Which tokens of a block belong to the sequence that lies across its midpoint. There is at most one.

    It is what chunks of several sequences are kept apart by: whatever passes from the first half of a block to the
    second is selected by it, so that nothing of a sequence is even multiplied with another's.
    """

    first: Tensor  # [n, 1, C / size, size / 2, 1]: of the first half, as bits
    second: Tensor  # the same of the second half

    @property
    def pairs(self) -> Tensor:
        """``[n, 1, C / size, size / 2, size / 2]``: tokens of the second half that read tokens of the first."""
        return self.second & self.first.mT


Crossings = Mapping[int, Crossing]  # by the size of the blocks


def as_bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask for :func:`select` from numbers of a dtype: integers as wide, of which all bits are set or none."""
    return mask.to(torch.int64 if dtype == torch.float64 else torch.int32).neg_()


def select(bits: Tensor | None, x: Tensor) -> Tensor:
    """``x`` where the mask says so, zero elsewhere whatever it holds there; all of ``x`` without a mask.

    Bits are what is selected by, for a CPU's sake: ``torch.where`` takes several times as long.
    """
    return x if bits is None else (x.view(bits.dtype) & bits).view(x.dtype)


class _Level(NamedTuple):
    """Blocks of ``size`` tokens: their second half reads their first half through the midpoint between them."""

    size: int
    hi_decay: Tensor  # [n, M, C / size, size / 2, K]: from the midpoint to each token of the second half
    lo_decay: Tensor  # [n, M, C / size, size / 2, K]: from each token of the first half to the midpoint
    crossing: Crossing | None


def _levels(prefix: Tensor, suffix: Tensor, crossings: Crossings | None) -> Iterator[_Level]:
    """Decays between tokens of a chunk, level by level from pairs of tokens up to the whole chunk.

    ``prefix`` comes in as the log decays ``g [n, M, C, K]`` and ``suffix`` as zeros. Both grow in place: at a level of
    blocks of ``size`` tokens they are the sums from a half block's start to each token (its own included), and from
    each token (its own excluded) to the half block's end. In the end they are those of the whole chunk. Of chunks that
    sequences share, read start and end of the sequence where these are nearer.

    A level's decays are overwritten by those of the next: fresh memory costs more here than arithmetic.
    """
    hi, lo = prefix.new_empty(2, prefix.numel() // 2)
    for size in _sizes(prefix):
        prefix_lo, prefix_hi = halves(prefix, size)
        suffix_lo, suffix_hi = halves(suffix, size)
        shape = prefix_hi.shape
        crossing = None if crossings is None else crossings[size]
        yield _Level(size, _exp(prefix_hi, hi.view(shape)), _exp(suffix_lo, lo.view(shape)), crossing)
        if crossing is None:
            suffix_lo += prefix_hi[..., -1:, :]
            prefix_hi += prefix_lo[..., -1:, :]
        else:  # what lies across may end within the second half, whose first token it has in any case
            suffix_lo += select(crossing.first, prefix_hi[..., :1, :] + suffix_hi[..., :1, :])
            prefix_hi += select(crossing.second, prefix_lo[..., -1:, :])


def _sizes(x: Tensor) -> Iterator[int]:
    """Of the blocks of a chunk ``[n, M, C, ...]``, from pairs of tokens up."""
    size = 2
    while size <= x.shape[2]:
        yield size
        size *= 2


def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
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


def _blocks(x: Tensor, size: int) -> Tensor:
    """Blocks of ``size`` on the diagonal of ``[n, M, C, C]``: a view ``[n, M, C / size, size, size]``."""
    n, M, C, _ = x.shape
    return x.view(n, M, C // size, size, C // size, size).diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)


def _below(x: Tensor, size: int) -> Tensor:
    """Blocks (second half, first half) of ``[n, M, C, C]``: a view ``[n, M, C / size, size / 2, size / 2]``."""
    half = size // 2
    return _blocks(x, size)[..., half:, :half]


def _by_tokens(x: Tensor, decay: Tensor, out: Tensor) -> Tensor:
    """``x [..., 2, K]`` times its tokens' ``decay [..., K]``, both rows of a token under each other: ``[..., K]``."""
    return torch.mul(x, decay.unsqueeze(-2), out=out.view(x.shape)).flatten(-3, -2)


def _exp(x: Tensor, out: Tensor) -> Tensor:
    """``exp(x)``, zero where it is far below rounding: CPUs are many times slower on subnormal numbers."""
    tiny = 1e-290 if x.dtype == torch.float64 else 1e-30
    return F.threshold(torch.exp(x, out=out), tiny, 0.0, inplace=True)


def decay(log_decay: Tensor) -> Tensor:
    """The decay, in place of its logarithm."""
    return _exp(log_decay, log_decay)


def _inverse(L: Tensor, crossings: Crossings | None) -> Tensor:
    """``(I + L)^-1`` for strictly lower ``L``, by substitution: of rows, or of blocks where sequences share a chunk."""
    if crossings is None:
        if L.shape[-1] == 1:
            return torch.ones_like(L)
        eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
        return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True).contiguous()
    T = torch.zeros_like(L)
    T.diagonal(dim1=-2, dim2=-1).fill_(1)
    for size, crossing in crossings.items():
        half, blocks, pairs = size // 2, _blocks(T, size), crossing.pairs
        below = select(pairs, _below(L, size))
        if size > 2:
            below = select(pairs, blocks[..., half:, half:] @ below @ blocks[..., :half, :half])
        blocks[..., half:, :half] = below.neg_()
    return T


def _times(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, without products of one or two columns by as many rows, on which CPUs are slow."""
    if a.shape[-1] > 2:
        return a @ b
    y = a[..., :1] * b[..., :1, :]
    return y if a.shape[-1] == 1 else y.addcmul_(a[..., 1:], b[..., 1:, :])


def product(lower: Tensor, x: Tensor, crossings: Crossings) -> Tensor:
    """``lower @ x`` of chunks that sequences share, ``[n, M, C, C]`` and ``[n, M, C, D]``, for scores ``lower``."""
    y = lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * x
    for size, (first, second) in crossings.items():
        read, scores = select(first, halves(x, size)[0]), _below(lower, size)
        halves(y, size)[1].add_(select(second, _times(scores, read)))
    return y


def product_t(lower: Tensor, x: Tensor, crossings: Crossings) -> Tensor:
    """``lower.mT @ x``, as :func:`product`."""
    y = lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * x
    for size, (first, second) in crossings.items():
        read, scores = select(second, halves(x, size)[1]), _below(lower, size).mT
        halves(y, size)[0].add_(select(first, _times(scores, read)))
    return y


def running_sums(x: Tensor, crossings: Crossings, *, reverse: bool = False) -> Tensor:
    """In place, sums of the rows of ``x [n, M, C, D]`` from the start of a token's part of a chunk to the token itself;
    with ``reverse`` from the token to the end."""
    for size, (first, second) in crossings.items():
        lo, hi = halves(x, size)
        if reverse:
            lo += select(first, hi[..., :1, :])
        else:
            hi += select(second, lo[..., -1:, :])
    return x


# ---------------------------------------------------------------------------------------------------------------------
# The factors of a chunk
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Chunks:
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


class Inputs(NamedTuple):
    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV, K]
    beta: Tensor  # [B, T, HV, 1]
    A_log: Tensor | None
    dt_bias: Tensor | None


class Activated(NamedTuple):
    q: Tensor  # [B, rows, HV, K]
    k: Tensor  # [B, rows, HV, K]
    v: Tensor
    g: Tensor  # log decay
    beta: Tensor


def take(layout: Layout, x: Inputs, c0: int, c1: int) -> Inputs:
    q, k, v, g, beta = (layout.take(t, c0, c1) for t in x[:5])
    return Inputs(q, k, v, g, beta, x.A_log, x.dt_bias)


def activate(x: Inputs, o: KdaOptions) -> Activated:
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
    return Activated(q, k, v, g, beta)


def _gate_input(g: Tensor, x: Inputs) -> tuple[Tensor, Tensor | None]:
    """``g + dt_bias`` and ``exp(A_log)``."""
    z = g if x.dt_bias is None else g + x.dt_bias.to(g.dtype).view(g.shape[-2:])
    return z, None if x.A_log is None else x.A_log.to(g.dtype).exp().unsqueeze(-1)


# torch.sigmoid and softplus round an element by its place in the tensor (vector or remainder); these do not.


def _sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_()


def _softplus(x: Tensor) -> Tensor:
    return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0))


def prepare(layout: Layout, x: Activated, scale: float, c0: int, c1: int, crossings: Crossings | None = None) -> Chunks:
    """The factors of chunks ``c0`` to ``c1``; ``crossings`` of those that sequences share."""
    v, beta = split(layout, x.v, c0, c1), split(layout, x.beta, c0, c1)
    prefix = split(layout, x.g, c0, c1)
    suffix = torch.zeros_like(prefix)
    n, M, C, K = prefix.shape
    qk = prefix.new_empty(n, M, C, 2, K)
    q, k = (split(layout, t, c0, c1, out) for t, out in zip((x.q, x.k), qk.unbind(3), strict=True))
    q *= scale
    PN = k.new_zeros(n, M, C, 2, C)
    scratch = torch.empty_like(prefix)
    PN[..., 0, :].diagonal(dim1=-2, dim2=-1).copy_(torch.mul(q, k, out=scratch).sum(-1))
    for size, hi, lo, crossing in _levels(prefix, suffix, crossings):
        scores = _by_tokens(halves(qk, size)[1], hi, scratch) @ lo.mul_(halves(k, size)[0]).mT
        scores = scores.unflatten(-2, (-1, 2))
        _score_blocks(PN, size).copy_(scores if crossing is None else select(crossing.pairs.unsqueeze(-2), scores))
    from_start, to_end = decay(prefix), decay(suffix)
    T = _inverse(beta * PN[..., 1, :], crossings)
    gamma = from_start[:, :, -1].unsqueeze(-1)
    return Chunks(
        qk, v, beta, from_start, to_end, gamma, k * from_start, q * from_start, k * to_end, PN, T, T * beta.mT
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Gradients through the factors, and from there to the inputs
# ---------------------------------------------------------------------------------------------------------------------


def pair_gradients(
    x: Chunks, dPN: Tensor, log_decay: Tensor, up: Tensor, k_down: Tensor, crossings: Crossings | None = None
) -> None:
    """Add to ``up`` the gradients of queries and keys ``[n, M, C, 2, K]`` as they read the tokens before them, and to
    ``k_down`` those of keys ``[n, M, C, K]`` as they are read, from that of the scores ``dPN [n, M, C, 2, C]``.

    Only what lies below the diagonal of ``dPN`` is read. ``log_decay [n, M, C, K]`` is overwritten.
    """
    scratch = torch.empty_like(log_decay)
    for size, hi, lo, crossing in _levels(log_decay, torch.zeros_like(log_decay), crossings):
        (qk_lo, qk_hi), blocks = halves(x.qk, size), _score_blocks(dPN, size)
        first = second = both = None
        if crossing is not None:
            first, second = crossing
            both = second.expand(-1, -1, -1, -1, 2).flatten(-2).unsqueeze(-1)  # both rows of each token
            blocks = select(crossing.pairs.unsqueeze(-2), blocks)
        blocks = blocks.flatten(3, 4)
        read = select(both, blocks @ select(first, qk_lo[..., 1, :] * lo)).unflatten(-2, (-1, 2))
        halves(up, size)[1].addcmul_(read, hi.unsqueeze(-2))
        read_by = select(first, blocks.mT @ select(both, _by_tokens(qk_hi, hi, scratch)))
        halves(k_down, size)[0].addcmul_(read_by, lo)


def store_gradients(
    layout: Layout,
    taken: Inputs,
    activated: Activated,
    options: KdaOptions,
    chunks: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grads: Inputs,
    c0: int,
    c1: int,
) -> None:
    """From the gradients of the activated inputs, in ``chunks [n, M, C, .]``, to rows ``c0`` to ``c1`` of ``grads``.

    Those of ``A_log`` and ``dt_bias`` are added up.
    """
    rows = taken.v.shape[1]
    dq, dk, dv, dg, dbeta = (_merge(layout, t, rows) for t in chunks)
    if options.use_gate_in_kernel:
        dg, dA_log, ddt_bias = _gate_backward(dg, taken, activated.g, options.lower_bound, layout.is_token(c0, c1))
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
    dg: Tensor, x: Inputs, decay: Tensor, lower_bound: float | None, is_token: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Through the gate: gradients of ``g``, ``A_log`` and ``dt_bias`` from that of the log decay ``decay``.

    ``is_token`` marks the rows that hold a token; the others must not reach the sums.
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
    if is_token is not None:
        dz, dlog_a = (torch.where(is_token.view(-1, 1, 1), t, 0) for t in (dz, dlog_a))
    return dz, dlog_a.sum((0, 1, 3)), dz.sum((0, 1))
