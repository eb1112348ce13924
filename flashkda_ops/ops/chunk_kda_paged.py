"""``flashkda::chunk_kda_paged``: prefill for serving; states are rows of a pool, updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from flashkda_ops import portable
from flashkda_ops.ops import chunk_kda
from flashkda_ops.paged import on_rows
from flashkda_ops.validation import (
    Sizes,
    check_cu_seqlens,
    check_slots,
    checks_values,
    state_dtype,
    validate_has_initial_state,
    validate_pool,
    validate_tokens,
)

__all__ = ["op"]

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state_pool, Tensor state_indices, "
    "Tensor? A_log=None, Tensor? dt_bias=None, Tensor? cu_seqlens=None, Tensor? has_initial_state=None, "
    "float? scale=None, bool use_qk_l2norm_in_kernel=False, bool use_gate_in_kernel=False, "
    "bool use_beta_sigmoid_in_kernel=False, bool allow_neg_eigval=False, float? lower_bound=None, "
    "bool state_v_first=False, bool batch_invariant=False, bool validate=False) -> Tensor"
)


def _validate(
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
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
) -> Sizes:
    sizes = validate_tokens(
        q, k, v, g, beta, A_log, dt_bias, cu_seqlens,
        use_gate_in_kernel=use_gate_in_kernel, use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval, lower_bound=lower_bound,
    )  # fmt: skip
    validate_pool(state_pool, state_indices, q, sizes, state_v_first, slots=1)
    validate_has_initial_state(has_initial_state, q, sizes)
    return sizes


@torch.library.custom_op("flashkda::chunk_kda_paged", mutates_args=("state_pool",), schema=SCHEMA)
def op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    state_indices: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    batch_invariant: bool = False,
    validate: bool = False,
) -> Tensor:
    sizes = _validate(
        q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias, cu_seqlens, has_initial_state, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first,
    )  # fmt: skip
    if checks_values(validate, q):
        check_cu_seqlens(cu_seqlens, sizes.T)
        check_slots(state_indices, state_pool.shape[0], cu_seqlens, None)
    if sizes.T == 0 or sizes.N == 0 or state_pool.shape[0] == 0:
        return v.new_zeros(sizes.B, sizes.T, sizes.HV, sizes.V)
    options = portable.KdaOptions(
        sizes.K**-0.5 if scale is None else scale,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        lower_bound,
    )

    def forward(initial_state: Tensor) -> tuple[Tensor, Tensor]:
        o, final_state, _ = chunk_kda.compute(
            sizes, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options,
            output_final_state=True, state_v_first=state_v_first, checkpoint_interval=0,
            batch_invariant=batch_invariant,
        )  # fmt: skip
        return o, final_state

    return on_rows(forward, state_pool, state_indices, cu_seqlens, has_initial_state, sizes.T, state_dtype(q))


@op.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    state_indices: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    batch_invariant: bool = False,
    validate: bool = False,
) -> Tensor:
    sizes = _validate(
        q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias, cu_seqlens, has_initial_state, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first,
    )  # fmt: skip
    return v.new_empty(sizes.B, sizes.T, sizes.HV, sizes.V)
