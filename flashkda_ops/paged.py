"""States in the rows of a pool: read before a call, written back after it, without reading an index on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["on_rows", "read_rows", "safe_cu_seqlens", "token_owner", "valid_slots", "write_rows"]


def safe_cu_seqlens(cu_seqlens: Tensor, T: int) -> Tensor:
    """``cu_seqlens`` as int64, made harmless where it is malformed: within ``[0, T]`` and never decreasing."""
    return cu_seqlens.long().clamp(0, T).cummax(0).values


def token_owner(cu_seqlens: Tensor, T: int) -> Tensor:
    """The sequence of each of ``T`` tokens by a safe ``cu_seqlens``: ``N`` behind the last one, 0 before the first."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(T, device=cu_seqlens.device), right=True)


def valid_slots(slots: Tensor, pool: Tensor) -> Tensor:
    return (slots >= 0) & (slots < pool.shape[0])


def read_rows(pool: Tensor, slots: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the pool in ``dtype``; zeros where not valid, whatever any row holds."""
    rows = pool.index_select(0, torch.where(valid, slots, 0))
    return rows.masked_fill_(~valid[:, None, None, None], 0).to(dtype)


def write_rows(pool: Tensor, slots: Tensor, valid: Tensor, states: Tensor) -> None:
    """Write ``states`` to the valid slots and leave every other row as it is.

    The number of rows written must not depend on values. So entries that are not valid write again what the first valid
    one writes; where there is none, row 0 writes itself.
    """
    any_valid = valid.any()
    source = torch.where(valid, torch.arange(valid.shape[0], device=valid.device), valid.to(torch.int8).argmax())
    slots = torch.where(any_valid, slots.index_select(0, source), 0)
    values = states.to(pool.dtype).index_select(0, source)
    pool.index_copy_(0, slots, torch.where(any_valid, values, pool[:1], out=values))


def on_rows(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    pool: Tensor,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
    has_initial_state: Tensor | None,
    T: int,
    dtype: torch.dtype,
) -> Tensor:
    """Outputs of ``forward(initial states) -> (o, final states)`` for states that live in the pool.

    Sequences whose slot is not a row are padding: their outputs are zero. Empty sequences leave their row as it is.
    """
    slots = state_indices.long()
    valid = valid_slots(slots, pool)
    started = valid if has_initial_state is None else valid & has_initial_state
    o, final = forward(read_rows(pool, slots, started, dtype))
    if cu_seqlens is None:
        written, token_valid = valid, valid.view(-1, 1, 1, 1)
    else:
        cu = safe_cu_seqlens(cu_seqlens, T)
        written = valid & (cu.diff() > 0)
        token_valid = valid[token_owner(cu, T).clamp(max=valid.shape[0] - 1)].view(1, -1, 1, 1)
    write_rows(pool, slots, written, final)
    return torch.where(token_valid, o, 0)
