"""``flashkda::recurrent_kda_paged``: decode, one or a few tokens a sequence; states are rows of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from flashkda_ops import cuda, portable
from flashkda_ops.validation import (
    Sizes,
    check_cu_seqlens,
    check_slots,
    checks_values,
    validate_num_accepted_tokens,
    validate_pool,
    validate_slots_per_token,
    validate_tokens,
)

__all__ = ["op"]

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state_pool, Tensor state_indices, "
    "Tensor? A_log=None, Tensor? dt_bias=None, Tensor? cu_seqlens=None, Tensor? num_accepted_tokens=None, "
    "float? scale=None, bool use_qk_l2norm_in_kernel=False, bool use_gate_in_kernel=False, "
    "bool use_beta_sigmoid_in_kernel=False, bool allow_neg_eigval=False, float? lower_bound=None, "
    "bool state_v_first=False, bool validate=False) -> Tensor"
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
    num_accepted_tokens: Tensor | None,
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
    validate_pool(state_pool, state_indices, q, sizes, state_v_first, slots=2)
    validate_num_accepted_tokens(num_accepted_tokens, state_indices, q, sizes)
    validate_slots_per_token(state_indices, cu_seqlens, sizes)
    return sizes


@torch.library.custom_op("flashkda::recurrent_kda_paged", mutates_args=("state_pool",), schema=SCHEMA)
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
    num_accepted_tokens: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    validate: bool = False,
) -> Tensor:
    sizes = _validate(
        q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias, cu_seqlens, num_accepted_tokens,
        use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first,
    )  # fmt: skip
    if checks_values(validate, q):
        check_cu_seqlens(cu_seqlens, sizes.T)
        check_slots(state_indices, state_pool.shape[0], cu_seqlens, num_accepted_tokens)
    if sizes.T == 0 or sizes.N == 0 or state_pool.shape[0] == 0:
        return v.new_zeros(sizes.B, sizes.T, sizes.HV, sizes.V)
    scale = sizes.K**-0.5 if scale is None else scale
    if q.is_cuda and (
        cuda.recurrent_kda_paged_reason(
            q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias, cu_seqlens, num_accepted_tokens, state_v_first
        )
        is None
    ):
        o = v.new_empty(sizes.B, sizes.T, sizes.HV, sizes.V)
        cuda.recurrent_kda_paged(
            o, q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias,
            scale=scale, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
            lower_bound=lower_bound,
        )  # fmt: skip
        return o
    options = portable.KdaOptions(
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound
    )
    return portable.recurrent_kda_paged(
        q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias, cu_seqlens, num_accepted_tokens, options,
        state_v_first=state_v_first,
    )  # fmt: skip


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
    num_accepted_tokens: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    validate: bool = False,
) -> Tensor:
    sizes = _validate(
        q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias, cu_seqlens, num_accepted_tokens,
        use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first,
    )  # fmt: skip
    return v.new_empty(sizes.B, sizes.T, sizes.HV, sizes.V)
