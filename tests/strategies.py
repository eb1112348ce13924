"""Calls of the ops as hypothesis draws them, the recurrence in fp64 that they are held to, and how closely."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pytest
import torch
from helpers import BETAS, GATES, TOKENS, Call, make_call
from torch import Tensor

from flashkda_ops.ops import chunk_kda
from flashkda_ops.reference import beta_activation, l2norm, log_decay

pytest.importorskip("hypothesis", reason="hypothesis draws the cases")

from hypothesis import strategies as st

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPEEDS = ("mixed", "slow", "fast", "still", "ends")
VALUES = ("random", "zeros", "one key", "beta at its ends", "reflected", "tiny", "huge")
PLACES = ("contiguous", "offset", "padded", "aligned", "heads first", "strided", "every other token", "reversed")
"""Where the numbers of a tensor lie in memory (:func:`placed`)."""
INDEX_DTYPES = (torch.int32, torch.int64)
WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Case:
    """A call of an op: ``build(case, device)`` makes its tensors, the same ones every time."""

    T: int
    B: int = 1
    cu_seqlens: tuple[int, ...] | None = None
    H: int = 1
    HV: int = 1
    K: int = 4
    V: int = 4
    dtype: torch.dtype = torch.float32
    g_dtype: torch.dtype = torch.float32
    beta_dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    gate: str = "precomputed"
    lower_bound: float = -5.0
    beta: str = "raw"
    l2norm: bool = False
    scale: float | None = None
    state_v_first: bool = False
    batch_invariant: bool = False
    initial_state: bool = False
    speed: str = "mixed"
    values: str = "random"
    fused: bool = False
    places: tuple[str, ...] = ("contiguous",) * 7
    expanded: tuple[str, int] | None = None
    seed: int = 0

    def __repr__(self) -> str:
        changed = [(x.name, getattr(self, x.name)) for x in fields(self) if getattr(self, x.name) != x.default]
        return f"Case({', '.join(f'{name}={value!r}' for name, value in changed)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """Of each sequence its row of the batch, its first token and the one behind its last: as every op reads
        ``cu_seqlens``, whatever it holds."""
        if self.cu_seqlens is None:
            return [(b, 0, self.T) for b in range(self.B)]
        bounds = itertools.accumulate((min(max(bound, 0), self.T) for bound in self.cu_seqlens), max)
        return [(0, start, end) for start, end in itertools.pairwise(bounds)]

    @property
    def lengths(self) -> list[int]:
        return [end - start for _, start, end in self.spans]

    @property
    def has_one_key(self) -> bool:
        return self.values in ("one key", "reflected") or self.expanded == ("k", 1)


EDGES = (1, 0, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65)
"""Numbers of tokens around which chunks and tiles begin."""

SEEDS = st.integers(0, 2**16)


def lengths(most: int) -> st.SearchStrategy[int]:
    edges = [edge for edge in EDGES if edge <= most]
    return st.one_of(st.sampled_from(edges), st.integers(0, most))


@st.composite
def bounds(draw: Any, most: int, sequences: int = 6) -> tuple[int, tuple[int, ...]]:
    """A number of tokens, and a ``cu_seqlens`` for it: of empty sequences and others, with padding behind the last."""
    parts = draw(st.lists(lengths(most), min_size=1, max_size=sequences))
    ends = tuple(itertools.accumulate(parts, initial=0))
    return ends[-1] + draw(st.sampled_from((0, 0, 1, 20))), ends


FAR = {torch.int32: (-1, -(2**31), 2**31 - 1), torch.int64: (-1, -(2**31), 2**31, 2**32, -(2**40), 2**62, -(2**63))}
"""Indices that no tensor of these tests has."""


@st.composite
def hostile_bounds(draw: Any, most: int, dtype: torch.dtype, sequences: int = 6) -> tuple[int, tuple[int, ...]]:
    """The same, of a ``cu_seqlens`` that breaks every rule: it decreases, starts or ends anywhere."""
    T = draw(lengths(most))
    entry = st.one_of(st.integers(-3, T + 3), st.sampled_from(FAR[dtype]))
    return T, tuple(draw(st.lists(entry, min_size=2, max_size=sequences + 1)))


class Sizes(NamedTuple):
    """Ranges that calls are drawn from on a device."""

    most_tokens: int
    heads: Sequence[int]
    groups: Sequence[int]
    widths: Sequence[tuple[int, int]]
    dtypes: Sequence[torch.dtype]


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NARROW, _WIDE = [(4, 4), (1, 1), (2, 3), (7, 5), (16, 8), (33, 16), (64, 40), (48, 64)], [(128, 2), (128, 128)]
KERNEL_WIDTHS = [(128, 128)] * 6 + [(64, 64), (96, 128), (128, 65), (127, 100)]
"""K and V that the chunk kernels serve, as they are or filled up."""

CPU = Sizes(160, (1, 2, 3), (1, 2, 3), [*_NARROW, *_WIDE], _FLOATS)
GPU = Sizes(
    300, (1, 2, 3, 16), (1, 1, 2, 3), [*KERNEL_WIDTHS, (64, 200), (16, 8)],
    (*[torch.bfloat16] * 4, *[torch.float16] * 2, torch.float32, torch.float64),
)  # fmt: skip


def sizes_of(device: str) -> Sizes:
    return CPU if device == "cpu" else GPU


# On a GPU, what makes a call of the chunk kernels take another way (csrc/sm90/chunk_kda_fwd/config.h, segments.py):
# tokens, the rows of a dense call or the ends of packed sequences, heads.
LONG: tuple[tuple[int, int | tuple[int, ...], int], ...] = (
    (1100, 1, 4),  # a dense call in segments, by maps that their own blocks find first
    (2085, 1, 1),  # the same, by maps of a grid ahead
    (2048, 1, 24),  # in shares, whole heads left over
    (2085, 1, 12),  # in shares, halves left over
    (700, 3, 4),
    (3000, (0, 1, 1, 1000, 1017, 2900), 4),  # packed sequences in shares
    (1500, (0, 375, 750, 1125, 1500), 16),
    (1500, (0, 1500), 8),
    (32768, (0, 9000, 9000, 31000), 2),  # packed sequences in segments
    (33000, (0, 33000), 1),
    (65536, 1, 1),  # a dense call whose backward pass is in segments
)


@st.composite
def cases(
    draw: Any,
    device: str,
    *,
    most_tokens: int | None = None,
    hostile: bool = False,
    packed: bool | None = None,
    long: bool = True,
    sequences: int = 5,
    values: Sequence[str] = VALUES,
    speeds: Sequence[str] = SPEEDS,
    widths: Sequence[tuple[int, int]] | None = None,
) -> Case:
    """Calls of any op.

    Args:
        device: "cpu" or "cuda", where kernels serve most of them, in every way that they have.
        most_tokens: of a sequence.
        hostile: ``cu_seqlens`` may hold anything.
        packed: whether there is one; either by default.
        long: on a GPU, calls so long that the kernels split them.
        sequences: the most there are.
    """
    sizes = sizes_of(device)
    most = sizes.most_tokens if most_tokens is None else most_tokens
    K, V = draw(st.sampled_from(widths or sizes.widths))
    H, group = draw(st.sampled_from(sizes.heads)), draw(st.sampled_from(sizes.groups))
    index_dtype = draw(st.sampled_from(INDEX_DTYPES))
    dtype = draw(st.sampled_from(sizes.dtypes))
    is_packed = draw(st.booleans()) if packed is None else packed
    T: int
    cu_seqlens: tuple[int, ...] | None = None
    B = 1
    values = [x for x in values if device == "cpu" or x != "reflected"]
    if device != "cpu" and long and draw(st.integers(0, 3)) == 0:
        T, rows, H = draw(st.sampled_from([way for way in LONG if packed is None or isinstance(way[1], int) != packed]))
        B, cu_seqlens = (rows, None) if isinstance(rows, int) else (1, rows)
        group = 1 if H > 4 else group
        K, V = (128, 128) if T > 4096 else (K, V)
        dtype = torch.bfloat16 if dtype.itemsize > 2 else dtype
    elif is_packed and hostile and draw(st.booleans()):
        T, cu_seqlens = draw(hostile_bounds(most, index_dtype, sequences))
    elif is_packed:
        T, cu_seqlens = draw(bounds(most, sequences))
    else:
        T, B = draw(lengths(most)), draw(st.integers(0, min(4, sequences)))
    wide = st.sampled_from((dtype, WIDE.get(dtype, dtype)))
    gate, beta = draw(st.sampled_from(GATES)), draw(st.sampled_from(BETAS))
    speed = draw(st.sampled_from([s for s in speeds if s != "still" or gate == "precomputed"]))
    is_fp64 = dtype == torch.float64
    place = st.one_of(st.just("contiguous"), st.sampled_from(PLACES))
    expanded = st.tuples(st.sampled_from(TOKENS), st.integers(0, 2))
    if device != "cpu":
        expanded = expanded.filter(lambda x: x != ("k", 1))
    return Case(
        T=T, B=B, cu_seqlens=cu_seqlens, H=H, HV=H * group, K=K, V=V, dtype=dtype, g_dtype=draw(wide),
        beta_dtype=draw(wide),
        parameter_dtype=torch.float64 if is_fp64 else draw(st.sampled_from((torch.float32, torch.bfloat16))),
        index_dtype=index_dtype, gate=gate, lower_bound=draw(st.sampled_from((-5.0, -1.0, -1e-3))), beta=beta,
        l2norm=draw(st.booleans()), scale=draw(st.sampled_from((None, None, 1.0, -0.3, 1e-3, 0.0))),
        state_v_first=draw(st.booleans()), batch_invariant=draw(st.booleans()), initial_state=draw(st.booleans()),
        speed=speed, values=draw(st.sampled_from(values)), fused=draw(st.booleans()),
        places=tuple(draw(place) for _ in range(7)), expanded=draw(st.one_of(st.none(), st.none(), expanded)),
        seed=draw(SEEDS),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is made of it
# ---------------------------------------------------------------------------------------------------------------------


def build(case: Case, device: str) -> Call:
    """The keyword arguments of ``chunk_kda``."""
    N = case.B if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    slow_heads = {"slow": case.HV, "fast": 0}.get(case.speed, case.HV // 2)
    call = make_call(
        case.T, B=case.B, H=case.H, HV=case.HV, K=case.K, V=case.V, gate=case.gate, beta=case.beta, l2norm=case.l2norm,
        dtype=torch.float64, slow_heads=slow_heads, state_v_first=case.state_v_first, seed=case.seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(case.seed + 1)
    if case.initial_state:
        width = (case.V, case.K) if case.state_v_first else (case.K, case.V)
        call["initial_state"] = torch.randn(N, case.HV, *width, generator=generator, dtype=torch.float64)
    _set_speed(call, case, generator)
    _set_values(call, case, generator)
    dtypes = dict.fromkeys("qkv", case.dtype) | {"g": case.g_dtype, "beta": case.beta_dtype}
    dtypes |= dict.fromkeys(("A_log", "dt_bias"), case.parameter_dtype)
    dtypes["initial_state"] = torch.promote_types(case.dtype, torch.float32)
    for name, dtype in dtypes.items():
        if name in call:
            call[name] = call[name].to(device, dtype)
    if case.gate.startswith("bounded"):
        call["lower_bound"] = case.lower_bound
    if case.cu_seqlens is not None:
        call["cu_seqlens"] = torch.tensor(case.cu_seqlens, dtype=case.index_dtype, device=device)
    _set_places(call, case)
    return call | {"scale": case.scale, "batch_invariant": case.batch_invariant}


def _set_speed(call: Call, case: Case, generator: torch.Generator) -> None:
    """``make_call`` knows fast, slow and mixed gates; here those that never forget, and those at both of their ends."""
    g = call["g"]
    if case.speed == "still":
        g.zero_()
    if case.speed == "ends":
        forgets = torch.rand(g.shape, generator=generator) < 0.3
        if case.gate == "precomputed":
            call["g"] = torch.where(forgets, -torch.inf, 0.0)
        else:
            call["g"] = torch.where(forgets, 60.0, -60.0)


def _set_values(call: Call, case: Case, generator: torch.Generator) -> None:
    is_raw = not call["use_beta_sigmoid_in_kernel"]
    if case.values in ("one key", "reflected"):  # the same key in all tokens, written with all of its strength or twice
        call["k"] = call["k"][:, :1].expand_as(call["k"]).clone()
        twice = case.values == "reflected"
        strength = (2.0 if twice else 1.0) if is_raw else 0.0 if call["allow_neg_eigval"] and not twice else 60.0
        call["beta"] = torch.full_like(call["beta"], strength)
    if case.values == "beta at its ends":
        ends = (0.0, 1.0, 2.0) if is_raw else (-60.0, 60.0)
        which = torch.randint(len(ends), call["beta"].shape, generator=generator)
        call["beta"] = torch.tensor(ends, dtype=torch.float64)[which]
    if case.values == "zeros":
        names = [name for name in (*TOKENS, "initial_state") if name in call]
        call[names[int(torch.randint(len(names), (), generator=generator))]].zero_()
    if case.values in ("tiny", "huge"):
        is_tiny, is_half = case.values == "tiny", case.dtype == torch.float16
        for name in ("v", "initial_state"):
            if name in call:
                if is_tiny:  # down to the smallest subnormal numbers, and somewhat above the normal ones
                    least, most = (-8, -4) if is_half else (-45, -34)
                    call[name] *= 10.0 ** torch.randint(least, most, call[name].shape, generator=generator)
                else:
                    call[name] *= 1e2 if is_half else 1e25
        if case.l2norm:
            for name in "qk":
                call[name] *= 1e-6 if is_tiny else 1e4


def _set_places(call: Call, case: Case) -> None:
    if case.expanded is not None:
        name, dim = case.expanded
        if call[name].shape[dim]:
            call[name] = call[name].narrow(dim, 0, 1).expand_as(call[name])
    names = (*TOKENS, "initial_state", "dt_bias")
    for name, place in zip(names, case.places, strict=True):
        if name in call and (case.expanded is None or name != case.expanded[0]):
            call[name] = placed(call[name], place)
    if case.fused:
        flat = [call[name].flatten(2) for name in "qkv"]
        parts = torch.cat(flat, -1).split([x.shape[-1] for x in flat], -1)
        call |= {name: x.view(call[name].shape) for name, x in zip("qkv", parts, strict=True)}
    if case.seed % 3 == 0:
        call |= {name: placed(call[name], "strided") for name in ("A_log", "cu_seqlens") if name in call}
    if "dt_bias" in call and case.seed % 5 == 0:
        call["dt_bias"] = call["dt_bias"].flatten()


def placed(x: Tensor, place: str) -> Tensor:
    """The same numbers elsewhere in memory, with NaN around them."""

    def blank(*shape: int) -> Tensor:
        return x.new_full(shape, torch.nan if x.is_floating_point() else 1 << 30)

    if place == "offset":  # one element off
        return blank(x.numel() + 2)[1:-1].view(x.shape).copy_(x)
    if place == "padded":  # a part of wider rows, which no load of several elements is aligned to
        return blank(*x.shape[:-1], x.shape[-1] + 3)[..., 1:-2].copy_(x)
    if place == "aligned":
        return blank(*x.shape[:-1], 2 * x.shape[-1])[..., x.shape[-1] :].copy_(x)
    if place == "heads first" and x.dim() > 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if place == "strided":
        return blank(*x.shape, 2)[..., 1].copy_(x)
    if place == "every other token" and x.dim() > 1:
        return blank(x.shape[0], 2 * x.shape[1], *x.shape[2:])[:, 1::2].copy_(x)
    if place == "reversed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    return x


def contiguous(call: Call) -> Call:
    """The call on copies of its tensors."""

    def copied(x: Any) -> Any:
        return x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x

    return {name: copied(x) for name, x in call.items()}


@contextmanager
def memory_poisoned() -> Iterator[None]:
    """What ``torch.empty`` returns holds NaN, or the largest integer: an op that returns memory which it did not write,
    or reads it before, gives other results in here."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that have no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def bits(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


# ---------------------------------------------------------------------------------------------------------------------
# The recurrence, and the distance from it
# ---------------------------------------------------------------------------------------------------------------------


def served(call: Call) -> bool:
    """Whether kernels serve the call in chunks: with 16-bit operands, and with gates that are clamped."""
    plan = chunk_kda.plan(chunk_kda.Arguments(**{x: call[x] for x in chunk_kda.Arguments._fields if x in call}))
    return plan.kernel is not None or plan.padded


class Exact(NamedTuple):
    """A call in fp64; ``N`` sequences, padded to ``L`` tokens."""

    o: Tensor  # [N, L, HV, V]
    o_sizes: Tensor  # [N, L, HV]: what a query of that length reads of such a state, of V numbers
    states: Tensor  # [N, C, HV, V, K]: after the numbers of tokens that were asked for
    state_sizes: Tensor  # [N, C, HV]


_CLAMP = -10.0  # of the chunk kernels, a token's log decay (docs/ops.md)
# Parts of a state that are dropped, over what a result is held to: 1e-30 (docs/numerics.md), and 2^-24 in shares.
_FORGOTTEN, _FORGOTTEN_BY_KERNELS = 1e-30 / 1e-6, 2**-24 / 8e-3


def exact(
    call: Call,
    spans: Sequence[tuple[int, int, int]],
    initial: Tensor | None = None,
    after: Tensor | None = None,
    clamped: bool = False,
) -> Exact:
    """All sequences side by side, token by token, in fp64.

    Where terms cancel, the digits that they have in common are lost to any algorithm. So beside each result there is
    its size: what it is made of, were nothing to cancel. A state's is that of the largest state before it, less what
    the gates have forgotten of it meanwhile; and what is forgotten to so small a part may be forgotten altogether.

    Args:
        spans: the row, the first token and the end of each sequence.
        initial: states ``[N, HV, V, K]``.
        after: numbers of tokens ``[N, C]`` whose states are wanted, by default that of all.
        clamped: gates forget no more than the chunk kernels let them.
    """
    q, k, v, g, beta = (call[name].detach().double() for name in TOKENS)
    device, (HV, V), K = v.device, v.shape[2:], q.shape[3]
    N, L = len(spans), max((end - start for _, start, end in spans), default=0)
    rows, starts, ends = (torch.tensor([span[i] for span in spans], device=device, dtype=torch.long) for i in range(3))
    lengths = ends - starts
    if after is None:
        after = lengths.unsqueeze(1)
    at = (starts.unsqueeze(1) + torch.arange(L, device=device)).clamp(max=max(q.shape[1] - 1, 0))
    alive = torch.arange(L, device=device) < lengths.unsqueeze(1)

    def take(x: Tensor) -> Tensor:
        x = x[rows.unsqueeze(1), at]
        return torch.where(alive.view(N, L, *[1] * (x.dim() - 2)), x, 0)

    q, k, v, g, beta = (take(x) for x in (q, k, v, g, beta))
    parameters = {name: None if call.get(name) is None else call[name].detach() for name in ("A_log", "dt_bias")}
    decay = log_decay(
        g, **parameters, use_gate_in_kernel=call.get("use_gate_in_kernel", False), lower_bound=call.get("lower_bound")
    )  # fmt: skip
    if clamped:
        decay = decay.clamp(min=_CLAMP)
    alpha = torch.where(alive[..., None, None], decay.exp(), 1.0)
    beta = beta_activation(
        beta, **{name: call[name] for name in ("use_beta_sigmoid_in_kernel", "allow_neg_eigval")}
    ) * alive.unsqueeze(-1)  # fmt: skip
    if call["use_qk_l2norm_in_kernel"]:
        q, k = l2norm(q), l2norm(k)
    scale = K**-0.5 if call.get("scale") is None else call["scale"]
    q, k = (x.repeat_interleave(HV // x.shape[2], 2) for x in (q * scale, k))

    S = q.new_zeros(N, HV, V, K) if initial is None else initial.detach().to(device, torch.float64)
    peak = size = S.flatten(2).norm(dim=-1)
    forgotten = _FORGOTTEN_BY_KERNELS if clamped else _FORGOTTEN
    o, o_sizes = q.new_zeros(N, L, HV, V), q.new_zeros(N, L, HV)
    states = S.unsqueeze(1).repeat(1, after.shape[1], 1, 1, 1)
    state_sizes = size.unsqueeze(1).repeat(1, after.shape[1], 1)
    kept = set(after.flatten().tolist())
    for t in range(L):
        S = S * alpha[:, t].unsqueeze(-2)
        u = beta[:, t].unsqueeze(-1) * (v[:, t] - (S @ k[:, t].unsqueeze(-1)).squeeze(-1))
        S = S + u.unsqueeze(-1) * k[:, t].unsqueeze(-2)
        norm = S.flatten(2).norm(dim=-1)
        peak = torch.maximum(peak, norm)
        size = torch.maximum(size * alpha[:, t].amax(-1), torch.maximum(norm, forgotten * peak))
        o[:, t] = (S @ q[:, t].unsqueeze(-1)).squeeze(-1)
        o_sizes[:, t] = q[:, t].norm(dim=-1) * size * K**-0.5
        if t + 1 in kept:
            n, c = (after == t + 1).nonzero(as_tuple=True)
            states[n, c], state_sizes[n, c] = S[n], size[n]
    return Exact(o, o_sizes, states, state_sizes)


def subnormal(dtype: torch.dtype, count: int) -> float:
    """The norm of what so many numbers lose where they are rounded to subnormal ones, which are as far from each other
    whatever their size."""
    steps = [torch.finfo(x).smallest_normal * torch.finfo(x).eps for x in (dtype, _computed(dtype))]
    return (steps[0] + 64 * steps[1]) * math.sqrt(count)


def distances(actual: Tensor, expected: Tensor, sizes: Tensor) -> Tensor:
    """``||actual - expected|| / max(||expected||, size)`` over the last two dimensions, where sizes are over the last
    but one. What is lost to subnormal numbers does not count."""
    lost = subnormal(actual.dtype, actual.shape[-1] * actual.shape[-2])
    away = ((actual.double() - expected).flatten(-2).norm(dim=-1) - lost).clamp(min=0)
    size = torch.maximum(expected.flatten(-2).norm(dim=-1), sizes.norm(dim=-1))
    return torch.where(away == 0, 0.0, away / size)


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Tolerance(NamedTuple):
    o: float
    state: float


ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0, torch.float64: 0.0}
"""What a result may lose as it is stored."""


def tolerance(case: Case, call: Call, is_served: bool) -> Tolerance:
    """How far a call may be from the recurrence, by the kernels in chunks or otherwise: ``docs/numerics.md`` tells why.

    Tokens that share a key, or have so few channels that they nearly do, make the triangular matrix of a chunk of C
    tokens as ill-conditioned as C^2 where beta is 2: then a state is reflected without end, and nothing of an error is
    forgotten either.
    """
    is_hard = case.has_one_key or case.values == "beta at its ends"
    if is_served:
        return Tolerance(2e-2, 4e-2) if is_hard else Tolerance(8e-3, 8e-3)
    has_twos = call["allow_neg_eigval"] or not call["use_beta_sigmoid_in_kernel"]
    is_reflected = case.values == "reflected" or (
        case.values == "beta at its ends" and (case.K < 8 or case.has_one_key)
    )
    computed = 1e-3 if is_reflected and has_twos else 1e-5 if is_hard or call["q"].is_cuda else 2e-6
    if case.dtype == torch.float64:
        computed *= 5e-9
    return Tolerance(computed + ROUNDED[case.dtype], computed)


def of_sequences(x: Tensor, spans: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """The rows of each sequence in ``x [B, T, ...]``."""
    return [x[row, start:end] for row, start, end in spans]


def outside(x: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
    """The rows of ``x [B, T, ...]`` that no sequence has."""
    is_outside = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for row, start, end in spans:
        is_outside[row, start:end] = False
    return x[is_outside]


def worst_output(o: Tensor, expected: Exact, spans: Sequence[tuple[int, int, int]]) -> float:
    """The distance of the worst sequence and head of ``o [B, T, HV, V]``."""
    found = [0.0]
    for n, part in enumerate(of_sequences(o, spans)):
        L = part.shape[0]
        if L:
            parts = (x[n, :L].transpose(0, 1) for x in (expected.o, expected.o_sizes))
            found.append(float(distances(part.transpose(0, 1), *parts).max()))
    return max(found)


def worst_state(states: Tensor, expected: Tensor, sizes: Tensor) -> float:
    """The distance of the worst of ``states [..., HV, V, K]``."""
    found = distances(states, expected, sizes.unsqueeze(-1))
    return float(found.max()) if found.numel() else 0.0
