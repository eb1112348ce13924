"""Heads of fewer channels than the chunk kernels have, filled up with channels that hold nothing.

Where keys and queries are zero a channel of K adds nothing to any product, and its row of the state stays zero; so does
a column of V whose values are. What is filled in for gates only has to forget: then kernels for fast gates serve these
channels too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashkda_ops.validation import Sizes

__all__ = ["NARROWEST", "WIDTH", "fits", "narrowed", "narrowed_gradients", "narrowed_state", "reason", "widened"]

WIDTH = 128
"""Channels of the kernels, of K and of V."""

NARROWEST = 64
"""The fewest channels that are filled up: with fewer, most of the work would be on what is filled in."""

_RAW_GATE, _LOG_DECAY = 20.0, -10.0  # what forgets, before and after the gate


def fits(s: Sizes) -> bool:
    """Whether filling up makes heads that the kernels may serve."""
    return all(NARROWEST <= width <= WIDTH for width in (s.K, s.V)) and (s.K, s.V) != (WIDTH, WIDTH)


def reason(s: Sizes) -> str | None:
    """Why the chunk kernels serve these heads neither as they are nor filled up, or None if they do."""
    if (s.K, s.V) == (WIDTH, WIDTH) or fits(s):
        return None
    return f"K={s.K}, V={s.V}: the kernels serve {NARROWEST} to {WIDTH} channels"


def _filled(x: Tensor, width: int = WIDTH, value: float = 0.0) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]), value=value)


def _filled_state(x: Tensor) -> Tensor:
    return F.pad(x, (0, WIDTH - x.shape[-1], 0, WIDTH - x.shape[-2]))


def widened(a: Any, scale: float) -> Any:
    """The arguments of ``flashkda::chunk_kda`` or of its backward pass; ``scale`` is that of the heads as they are."""
    changes: dict[str, Any] = {name: _filled(getattr(a, name)) for name in ("q", "k", "v")}
    changes["g"] = _filled(a.g, value=_RAW_GATE if a.use_gate_in_kernel else _LOG_DECAY)
    changes["scale"] = scale
    if a.dt_bias is not None:
        changes["dt_bias"] = _filled(a.dt_bias.reshape(a.g.shape[2:]))
    if a.initial_state is not None:
        changes["initial_state"] = _filled_state(a.initial_state)
    if getattr(a, "do", None) is not None:
        changes["do"] = _filled(a.do)
    if getattr(a, "dht", None) is not None:
        changes["dht"] = _filled_state(a.dht)
    return a._replace(**changes)


def narrowed(x: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows and columns of the last two dimensions, in memory of their own: callers may write to results."""
    part = x[..., :rows, :columns]
    return x if part.shape == x.shape else part.clone(memory_format=torch.contiguous_format)


def narrowed_state(state: Tensor, s: Sizes, v_first: bool) -> Tensor:
    return narrowed(state, *((s.V, s.K) if v_first else (s.K, s.V)))


def narrowed_gradients(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of each input its gradient, where there is one."""
    grads_of: list[Tensor | None] = []
    for grad, x in zip(grads, inputs, strict=True):
        if grad is None or x is None:
            grads_of.append(None)
        elif x.dim() == 4:  # tokens, of the same number of heads, or a state
            grads_of.append(narrowed(grad, *x.shape[-2:]))
        elif grad.dim() == 2:  # dt_bias, which may be flat
            part, dx = grad[:, : x.numel() // grad.shape[0]], grad.new_empty(x.shape)
            dx.view(part.shape).copy_(part)
            grads_of.append(dx)
        else:
            grads_of.append(grad)
    return grads_of
