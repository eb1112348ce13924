"""``flashkda::chunk_kda_paged``: prefill for serving; states are rows of a pool, updated in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkda_ops import cuda, portable
from flashkda_ops.ops import chunk_kda, plans
from flashkda_ops.options import KdaOptions
from flashkda_ops.paged import on_rows, safe_cu_seqlens, valid_slots, write_rows
from flashkda_ops.validation import (
    Sizes,
    check_cu_seqlens,
    check_slots,
    checks_values,
    state_dtype,
    validate_checkpoints,
    validate_has_initial_state,
    validate_pool,
    validate_tokens,
)

__all__ = ["Arguments", "op", "run"]

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state_pool, Tensor state_indices, "
    "Tensor? A_log=None, Tensor? dt_bias=None, Tensor? cu_seqlens=None, Tensor? has_initial_state=None, "
    "float? scale=None, bool use_qk_l2norm_in_kernel=False, bool use_gate_in_kernel=False, "
    "bool use_beta_sigmoid_in_kernel=False, bool allow_neg_eigval=False, float? lower_bound=None, "
    "bool state_v_first=False, bool batch_invariant=False, bool validate=False, "
    "Tensor? checkpoint_offsets=None, Tensor? checkpoint_indices=None) -> Tensor"
)


class Arguments(NamedTuple):
    """The arguments of the schema, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state_pool: Tensor
    state_indices: Tensor
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    has_initial_state: Tensor | None = None
    scale: float | None = None
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    lower_bound: float | None = None
    state_v_first: bool = False
    batch_invariant: bool = False
    validate: bool = False
    checkpoint_offsets: Tensor | None = None
    checkpoint_indices: Tensor | None = None


def _validate_pool(a: Arguments, sizes: Sizes) -> None:
    validate_pool(a.state_pool, a.state_indices, a.q, sizes, a.state_v_first, slots=1)
    validate_has_initial_state(a.has_initial_state, a.q, sizes)
    validate_checkpoints(a.checkpoint_offsets, a.checkpoint_indices, a.q, sizes)


@torch.library.custom_op("flashkda::chunk_kda_paged", mutates_args=("state_pool",), schema=SCHEMA)
def op(*args: Any) -> Tensor:
    return run(Arguments(*args))


def run(a: Arguments) -> Tensor:
    tensors = (*a[:5], a.A_log, a.dt_bias, None, a.cu_seqlens)
    sizes, options, kernel, *_ = plans.plan(tensors, a[11:18])
    _validate_pool(a, sizes)
    if checks_values(a.validate, a.q):
        check_cu_seqlens(a.cu_seqlens, sizes.T)
        check_slots(a.state_indices, a.state_pool.shape[0], a.cu_seqlens, None, a.checkpoint_indices)
    if sizes.T == 0 or sizes.N == 0 or a.state_pool.shape[0] == 0:
        return a.v.new_zeros(sizes.B, sizes.T, sizes.HV, sizes.V)
    if kernel is not None and cuda.chunk_kda_paged_reason(a.state_pool) is None:
        o = torch.empty_like(a.v, memory_format=torch.contiguous_format)
        cuda.chunk_kda_paged(
            kernel, o, tensors, a.state_pool, a.state_indices, a.has_initial_state, a.checkpoint_offsets,
            a.checkpoint_indices, batch_invariant=a.batch_invariant,
        )  # fmt: skip
        return o
    unpaged = {name: value for name, value in a._asdict().items() if name in chunk_kda.Arguments._fields}

    def forward(initial_state: Tensor) -> tuple[Tensor, Tensor]:
        if a.checkpoint_offsets is not None and a.checkpoint_indices is not None:
            return _with_checkpoints(a, initial_state, a.checkpoint_offsets, a.checkpoint_indices, options)
        call = chunk_kda.Arguments(**unpaged, initial_state=initial_state, output_final_state=True)
        o, final_state, _ = chunk_kda.run(call)
        assert final_state is not None
        return o, final_state

    return on_rows(forward, a.state_pool, a.state_indices, a.cu_seqlens, a.has_initial_state, sizes.T, state_dtype(a.q))


def _with_checkpoints(
    a: Arguments, initial_state: Tensor, offsets: Tensor, indices: Tensor, options: KdaOptions
) -> tuple[Tensor, Tensor]:
    """Outputs and final states, on the portable path; the states at ``offsets`` go into the rows ``indices``."""
    o, final, states = portable.chunk_kda_at_offsets(
        *a[:5], a.A_log, a.dt_bias, initial_state, a.cu_seqlens, offsets, options,
        state_v_first=a.state_v_first, batch_invariant=a.batch_invariant,
    )  # fmt: skip
    T = a.q.shape[1]
    length = T if a.cu_seqlens is None else safe_cu_seqlens(a.cu_seqlens, T).diff().unsqueeze(1)
    inside = (offsets >= 1) & (offsets <= length) & valid_slots(a.state_indices, a.state_pool).unsqueeze(1)
    slots = indices.long()
    written = inside & valid_slots(slots, a.state_pool)
    write_rows(a.state_pool, slots.flatten(), written.flatten(), states.flatten(0, 1))
    return o, final


@op.register_fake
def _fake(*args: Any) -> Tensor:
    a = Arguments(*args)
    sizes = validate_tokens(a)
    _validate_pool(a, sizes)
    return a.v.new_empty(sizes.B, sizes.T, sizes.HV, sizes.V)
