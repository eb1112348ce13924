"""What the ops accept. One set of checks, run first by the real and by the fake implementation of every op.

Each failure is a ``ValueError`` that names the argument, what was given and what is accepted. Sizes may be symbolic:
conditions on them go through :func:`torch._check_value`, so that tracing records a guard instead of specialising.
Messages hold no quotes and no newlines, since compilers embed them in their own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import is_tensor_like

from flashkda_ops.options import Call

CHECK_VALUES = os.environ.get("FLASHKDA_CHECK", "0") not in ("", "0")
"""Whether eager calls check the values of index tensors on the host (``FLASHKDA_CHECK=1``)."""

TOKEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
_WIDE = {  # what g and beta may be, beside q
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
}
_MIN_LOWER_BOUND = -5.0
_PLAIN = frozenset((Tensor, torch.nn.Parameter))  # types whose sizes are numbers, not symbols


class Sizes(NamedTuple):
    """Sizes of a call: batch, tokens, query/key heads, value heads, key and value head dimensions, sequences."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    if condition is not True:
        torch._check_value(condition, message)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    *others, last = (str(d).removeprefix("torch.") for d in dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def require_shape(name: str, x: Tensor, letters: str, *shape: int) -> None:
    """``x`` has exactly ``shape``, spelled ``letters``."""
    if type(x) in _PLAIN and x.shape == shape:
        return

    def message() -> str:
        return f"{name} must have shape [{letters}] = {_sizes(shape)}, got {_sizes(x.shape)}"

    require(x.dim() == len(shape), message)
    for actual, expected in zip(x.shape, shape, strict=True):
        require(actual == expected, message)


def _fits(x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> bool:
    """Whether x, of numbers for sizes, passes the checks below, which cost several times as much and name a failure."""
    return type(x) in _PLAIN and x.shape == shape and x.dtype in dtypes and x.device == device


def _sizes(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def require_tensor(name: str, x: object, *, optional: bool = False) -> None:
    _require_kind(name, x, "Optional[Tensor]" if optional else "Tensor")


def _require_kind(name: str, x: object, kind: str, error: Exception | None = None) -> None:
    """``x`` is something that torch takes as an argument of a type of its schemas."""
    optional = kind.startswith("Optional[")
    if optional and x is None:
        return
    kind = kind.removeprefix("Optional[").removesuffix("]")
    if not (is_tensor_like(x) if kind == "Tensor" else _is_number(x)):
        expected = {"Tensor": "a Tensor", "bool": "a bool"}.get(kind, "a number") + (" or None" if optional else "")
        given = "None" if x is None else "Tensor" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be {expected}, got {given}") from error


def _is_number(x: Any) -> bool:
    if isinstance(x, (str, bytes)):
        return False
    try:
        float(x)
    except Exception:
        return False
    return True


def require_types(op: Any, args: Sequence[object], error: Exception | None = None) -> None:
    """The arguments have the types of the op's schema; ``error`` is what came of it where they were found not to.

    Most calls look only once they have failed: torch takes more types than are easily told.
    """
    for argument, x in zip(op._opoverload._schema.arguments, args, strict=False):
        _require_kind(argument.name, x, str(argument.type), error)


def require_dtype(
    name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], q: Tensor | None = None, lead: str = "q"
) -> None:
    """``x`` has one of ``dtypes``, which follow from that of ``q`` where it is given."""
    if x.dtype not in dtypes:
        where = "" if q is None else f" where {lead} is {_names((q.dtype,))}"
        raise ValueError(f"{name} must be {_names(dtypes)}{where}, got {_names((x.dtype,))}")


def require_device(name: str, x: Tensor, q: Tensor, lead: str = "q") -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q.device} as {lead} is, got {x.device}")


def state_dtype(q: Tensor) -> torch.dtype:
    """The dtype of the states that go with ``q``, and of the computation on the portable path."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def validate_tokens(call: Call, lead: str = "q") -> Sizes:
    """Check what all ops have in common; returns the sizes of the call.

    ``lead`` is the argument that the others are compared with: an op without queries has its keys in their place.
    """
    q, k, v, g, beta, cu_seqlens = call.q, call.k, call.v, call.g, call.beta, call.cu_seqlens
    for name, x in ((lead, q), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, T, heads, head dim], got shape {_sizes(x.shape)}")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype, device = q.dtype, q.device
    wide = _WIDE.get(dtype, ())
    if not (
        type(q) in _PLAIN
        and H > 0
        and K > 0
        and V > 0
        and HV > 0
        and HV % H == 0
        and _fits(k, (B, T, H, K), (dtype,), device)
        and _fits(v, (B, T, HV, V), (dtype,), device)
        and _fits(g, (B, T, HV, K), wide, device)
        and _fits(beta, (B, T, HV), wide, device)
    ):
        require_dtype(lead, q, TOKEN_DTYPES)
        require(H > 0, lambda: f"{lead} must have at least one head, got 0")
        require(K > 0, lambda: f"{lead} must have a head dimension of at least 1, got 0")
        require(V > 0, lambda: "v must have a head dimension of at least 1, got 0")
        require_shape("k", k, "B, T, H, K", B, T, H, K)
        require_shape("v", v, "B, T, HV, V", B, T, HV, V)
        require(HV > 0, lambda: "v must have at least one head, got 0")
        require(
            HV % H == 0,
            lambda: f"v must have a multiple of the heads of {lead}, got {HV} value heads for {H} query/key heads",
        )
        require_shape("g", g, "B, T, HV, K", B, T, HV, K)
        require_shape("beta", beta, "B, T, HV", B, T, HV)
        for name, x in (("k", k), ("v", v)):
            require_dtype(name, x, (dtype,), q, lead)
            require_device(name, x, q, lead)
        for name, x in (("g", g), ("beta", beta)):
            require_dtype(name, x, wide, q, lead)
            require_device(name, x, q, lead)

    _validate_gate(call, HV, K, lead)
    if call.allow_neg_eigval and not call.use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval=True requires use_beta_sigmoid_in_kernel=True")
    if cu_seqlens is None:
        return Sizes(B, T, H, HV, K, V, B)
    if cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens must have shape [N + 1], got {_sizes(cu_seqlens.shape)}")
    entries = cu_seqlens.shape[0]
    require(entries >= 2, lambda: f"cu_seqlens must have at least 2 entries [N + 1], got {entries}")
    require_dtype("cu_seqlens", cu_seqlens, INDEX_DTYPES)
    require_device("cu_seqlens", cu_seqlens, q, lead)
    require(B == 1, lambda: f"{lead} must have a batch size of 1 with cu_seqlens (sequences packed along T), got {B}")
    return Sizes(B, T, H, HV, K, V, entries - 1)


def _validate_gate(call: Call, HV: int, K: int, lead: str) -> None:
    q, A_log, dt_bias, lower_bound = call.q, call.A_log, call.dt_bias, call.lower_bound
    if not call.use_gate_in_kernel:
        for name, value in (("A_log", A_log), ("dt_bias", dt_bias), ("lower_bound", lower_bound)):
            if value is not None:
                raise ValueError(f"{name} must be None with use_gate_in_kernel=False: g is the log decay itself")
        return
    if lower_bound is None:
        if A_log is None:
            raise ValueError("A_log must be given with use_gate_in_kernel=True unless lower_bound is")
    elif not _MIN_LOWER_BOUND <= lower_bound < 0:
        raise ValueError(f"lower_bound must be in [{_MIN_LOWER_BOUND:g}, 0), got {lower_bound}")
    dtypes = TOKEN_DTYPES if q.dtype is torch.float64 else TOKEN_DTYPES[:3]
    device = q.device
    if A_log is not None and not _fits(A_log, (HV,), dtypes, device):
        require_shape("A_log", A_log, "HV", HV)
        require_dtype("A_log", A_log, dtypes)
        require_device("A_log", A_log, q, lead)
    if dt_bias is not None:
        letters, shape = ("HV * K", (HV * K,)) if dt_bias.dim() == 1 else ("HV, K", (HV, K))
        if not _fits(dt_bias, shape, dtypes, device):
            require_shape("dt_bias", dt_bias, letters, *shape)
            require_dtype("dt_bias", dt_bias, dtypes)
            require_device("dt_bias", dt_bias, q, lead)


def state_shape(s: Sizes, rows: int, state_v_first: bool) -> tuple[int, int, int, int]:
    """Shape of ``rows`` states in the layout asked for."""
    return (rows, s.HV, s.V, s.K) if state_v_first else (rows, s.HV, s.K, s.V)


def validate_state(name: str, state: Tensor | None, q: Tensor, s: Sizes, state_v_first: bool) -> None:
    """A state argument with one row a sequence."""
    if state is None:
        return
    shape, dtypes = state_shape(s, s.N, state_v_first), (state_dtype(q),)
    if _fits(state, shape, dtypes, q.device):
        return
    require_shape(name, state, "N, HV, V, K" if state_v_first else "N, HV, K, V", *shape)
    require_dtype(name, state, dtypes, q)
    require_device(name, state, q)


def validate_checkpoint_interval(interval: int) -> None:
    if interval < 0 or interval % 16:
        raise ValueError(f"checkpoint_interval must be 0 (no intermediate states) or a multiple of 16, got {interval}")


def validate_pool(pool: Tensor, state_indices: Tensor, q: Tensor, s: Sizes, state_v_first: bool, *, slots: int) -> None:
    """A state pool and the slots of its rows: one a sequence, or (``slots=2``) also one a sequence and token."""
    letters = "rows, HV, V, K" if state_v_first else "rows, HV, K, V"
    if pool.dim() != 4:
        raise ValueError(f"state_pool must have shape [{letters}], got {_sizes(pool.shape)}")
    shape, strides = state_shape(s, pool.shape[0], state_v_first), pool.stride()
    rows, HV, d1, d2 = shape
    dtypes = (torch.float64,) if q.dtype is torch.float64 else (torch.float32, torch.bfloat16)
    dense, row = (d1 * d2, d2, 1), HV * d1 * d2
    if not (_fits(pool, shape, dtypes, q.device) and strides[1:] == dense and (rows <= 1 or strides[0] >= row)):
        require_shape("state_pool", pool, letters, *shape)
        require_dtype("state_pool", pool, dtypes, q)
        require_device("state_pool", pool, q)
        for size, stride, step in zip(shape[1:], strides[1:], dense, strict=True):
            require(
                size == 1 or stride == step,
                lambda: (
                    "state_pool must have contiguous rows (its first dimension alone may be strided): it is updated in "
                    f"place, got strides {_sizes(strides)} for shape {_sizes(shape)}"
                ),
            )
        require(
            rows <= 1 or strides[0] >= row,
            lambda: f"state_pool must not have overlapping rows, got strides {_sizes(strides)}",
        )
    if not _fits(state_indices, (s.N,), INDEX_DTYPES, q.device):
        if slots == 2 and state_indices.dim() == 2:
            width = state_indices.shape[1]
            require_shape("state_indices", state_indices, "N, slots", s.N, width)
            require(width > 0, lambda: "state_indices must have at least one slot a sequence, got 0")
        else:
            require_shape("state_indices", state_indices, "N", s.N)
        require_dtype("state_indices", state_indices, INDEX_DTYPES)
        require_device("state_indices", state_indices, q)


def validate_num_accepted_tokens(accepted: Tensor | None, state_indices: Tensor, q: Tensor, s: Sizes) -> None:
    if accepted is None:
        return
    if state_indices.dim() != 2:
        raise ValueError("num_accepted_tokens requires state_indices of shape [N, slots], one slot a token")
    require_shape("num_accepted_tokens", accepted, "N", s.N)
    require_dtype("num_accepted_tokens", accepted, INDEX_DTYPES)
    require_device("num_accepted_tokens", accepted, q)


def validate_has_initial_state(has_initial_state: Tensor | None, q: Tensor, s: Sizes) -> None:
    if has_initial_state is None:
        return
    require_shape("has_initial_state", has_initial_state, "N", s.N)
    require_dtype("has_initial_state", has_initial_state, (torch.bool,))
    require_device("has_initial_state", has_initial_state, q)


def validate_checkpoints(offsets: Tensor | None, indices: Tensor | None, q: Tensor, s: Sizes) -> None:
    """Where intermediate states are asked for, and the rows of the pool they go to."""
    if offsets is None or indices is None:
        if indices is not None:
            raise ValueError("checkpoint_offsets must be given with checkpoint_indices")
        if offsets is not None:
            raise ValueError("checkpoint_indices must be given with checkpoint_offsets")
        return
    width = indices.shape[1] if indices.dim() == 2 else 1
    for name, x in (("checkpoint_indices", indices), ("checkpoint_offsets", offsets)):
        require_shape(name, x, "N, checkpoints", s.N, width)
        require_dtype(name, x, INDEX_DTYPES)
        require_device(name, x, q)
    require(width > 0, lambda: "checkpoint_indices must have at least one checkpoint a sequence, got 0")


def validate_slots_per_token(state_indices: Tensor, cu_seqlens: Tensor | None, s: Sizes) -> None:
    """Each token of a dense call has a slot for its state; packed calls are checked with their values."""
    if state_indices.dim() == 2 and cu_seqlens is None:
        width = state_indices.shape[1]
        require(width >= s.T, lambda: f"state_indices must have a slot a token, got {width} for T = {s.T}")


# ---------------------------------------------------------------------------------------------------------------------
# Values, on the host: only in checked mode, never while a CUDA graph is captured
# ---------------------------------------------------------------------------------------------------------------------


def checks_values(validate: bool, q: Tensor) -> bool:
    """Whether this eager call reads index tensors on the host."""
    if not (validate or CHECK_VALUES):
        return False
    return not (q.is_cuda and torch.cuda.is_current_stream_capturing())


def check_cu_seqlens(cu_seqlens: Tensor | None, T: int) -> None:
    """``cu_seqlens`` starts at 0, never decreases and ends at or before ``T``."""
    if cu_seqlens is None:
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {values[0]}")
    for i, (a, b) in enumerate(pairwise(values)):
        if b < a:
            raise ValueError(f"cu_seqlens must never decrease, got {a} then {b} at entry {i + 1}")
    if values[-1] > T:
        raise ValueError(f"cu_seqlens must end at or before T = {T}, got {values[-1]}")


def check_slots(
    state_indices: Tensor,
    rows: int,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    checkpoint_indices: Tensor | None = None,
) -> None:
    """No slot is written twice, no sequence is longer than its slots, accepted counts are within them."""
    slots, names = state_indices.flatten().tolist(), "state_indices"
    if checkpoint_indices is not None:
        slots, names = slots + checkpoint_indices.flatten().tolist(), "state_indices and checkpoint_indices"
    for slot, times in Counter(slots).items():
        if times > 1 and 0 <= slot < rows:
            raise ValueError(f"{names} must name each row of state_pool once, got {slot} {times} times")
    if state_indices.dim() == 2:
        width = state_indices.shape[1]
        if cu_seqlens is not None:
            longest = int(cu_seqlens.diff().max())
            if longest > width:
                raise ValueError(f"state_indices must have a slot a token, got {width} for a sequence of {longest}")
        if num_accepted_tokens is not None:
            for n, row in zip(num_accepted_tokens.tolist(), state_indices.tolist(), strict=True):
                if not 0 <= n <= width and any(0 <= slot < rows for slot in row):
                    raise ValueError(f"num_accepted_tokens must be in [1, {width}], or 0 for padding, got {n}")
