"""``flashkda::recurrent_kda_paged``: decode, one or a few tokens a sequence; states are rows of a pool."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkda_ops import cuda, portable
from flashkda_ops.options import KdaOptions
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

__all__ = ["Arguments", "op", "run"]

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state_pool, Tensor state_indices, "
    "Tensor? A_log=None, Tensor? dt_bias=None, Tensor? cu_seqlens=None, Tensor? num_accepted_tokens=None, "
    "float? scale=None, bool use_qk_l2norm_in_kernel=False, bool use_gate_in_kernel=False, "
    "bool use_beta_sigmoid_in_kernel=False, bool allow_neg_eigval=False, float? lower_bound=None, "
    "bool state_v_first=False, bool validate=False) -> Tensor"
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
    num_accepted_tokens: Tensor | None = None
    scale: float | None = None
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    lower_bound: float | None = None
    state_v_first: bool = False
    validate: bool = False


def _validate(a: Arguments) -> Sizes:
    sizes = validate_tokens(a)
    validate_pool(a.state_pool, a.state_indices, a.q, sizes, a.state_v_first, slots=2)
    validate_num_accepted_tokens(a.num_accepted_tokens, a.state_indices, a.q, sizes)
    validate_slots_per_token(a.state_indices, a.cu_seqlens, sizes)
    return sizes


@torch.library.custom_op("flashkda::recurrent_kda_paged", mutates_args=("state_pool",), schema=SCHEMA)
def op(*args: Any) -> Tensor:
    return run(Arguments(*args))


def run(a: Arguments) -> Tensor:
    sizes = _validate(a)
    if checks_values(a.validate, a.q):
        check_cu_seqlens(a.cu_seqlens, sizes.T)
        check_slots(a.state_indices, a.state_pool.shape[0], a.cu_seqlens, a.num_accepted_tokens)
    if sizes.T == 0 or sizes.N == 0 or a.state_pool.shape[0] == 0:
        return a.v.new_zeros(sizes.B, sizes.T, sizes.HV, sizes.V)
    options = KdaOptions.of(a)
    if a.q.is_cuda and cuda.recurrent_kda_paged_reason(*a[:6]) is None:
        o = a.v.new_empty(sizes.B, sizes.T, sizes.HV, sizes.V)
        cuda.recurrent_kda_paged(o, *a[:11], options, state_v_first=a.state_v_first)
        return o
    return portable.recurrent_kda_paged(*a[:11], options, state_v_first=a.state_v_first)


@op.register_fake
def _fake(*args: Any) -> Tensor:
    a = Arguments(*args)
    sizes = _validate(a)
    return a.v.new_empty(sizes.B, sizes.T, sizes.HV, sizes.V)
