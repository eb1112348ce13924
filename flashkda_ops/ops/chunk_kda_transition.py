"""``flashkda::chunk_kda_transition``: what the tokens of a sequence do to its state, as an affine map."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashkda_ops import cuda, padding, portable
from flashkda_ops.ops import chunk_kda_backward, plans
from flashkda_ops.validation import (
    Sizes,
    check_cu_seqlens,
    checks_values,
    state_dtype,
    state_shape,
    validate_tokens,
)

__all__ = ["Arguments", "op"]

# Returns M and B. With V-first states a sequence that starts from S ends in S M + B, with K-first ones in M S + B.
SCHEMA = (
    "(Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log=None, Tensor? dt_bias=None, Tensor? cu_seqlens=None, "
    "bool use_qk_l2norm_in_kernel=False, bool use_gate_in_kernel=False, bool use_beta_sigmoid_in_kernel=False, "
    "bool allow_neg_eigval=False, float? lower_bound=None, bool state_v_first=False, bool validate=False) "
    "-> (Tensor, Tensor)"
)


class Arguments(NamedTuple):
    """The arguments of the schema, in its order."""

    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    lower_bound: float | None = None
    state_v_first: bool = False
    validate: bool = False

    @property
    def q(self) -> Tensor:
        """Keys where other ops have queries: there are none here."""
        return self.k

    @property
    def scale(self) -> None:
        return None


def _validate(a: Arguments) -> Sizes:
    return validate_tokens(a, lead="k")


@torch.library.custom_op("flashkda::chunk_kda_transition", mutates_args=(), schema=SCHEMA)
def op(*args: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*args)
    sizes = _validate(a)
    if checks_values(a.validate, a.k):
        check_cu_seqlens(a.cu_seqlens, sizes.T)
    tensors = (a.k, *a[:6], None, a.cu_seqlens)
    _, options, kernel, *_ = plans.plan(tensors, (None, *a[7:13]))
    if kernel is None:
        return portable.chunk_kda_transition(*a[:7], options, state_v_first=a.state_v_first)
    M, B = _outputs(a, sizes)
    cuda.chunk_kda_transition(kernel, M, B, tensors)
    return M, B


def _outputs(a: Arguments, sizes: Sizes) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(a.k)
    M = a.k.new_empty(sizes.N, sizes.HV, sizes.K, sizes.K, dtype=dtype)
    return M, a.k.new_empty(state_shape(sizes, sizes.N, a.state_v_first), dtype=dtype)


@op.register_fake
def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*args)
    return _outputs(a, _validate(a))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a = Arguments(*inputs)
    ctx.save_for_backward(*a[:7])
    ctx.options = a[7:12]
    ctx.state_v_first = a.state_v_first


def _backward(ctx: Any, dM: Tensor, dB: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients through ``flashkda::chunk_kda``, of which this op is a special case.

    ``[B | M]`` is the final state of a call on the values ``[v | 0]`` from the state ``[0 | I]``. So the gradients are
    those of that call: there is no second set of formulas to keep right.
    """
    k, v, g, beta, A_log, dt_bias, cu_seqlens = ctx.saved_tensors
    l2norm, gate, sigmoid, negative, lower_bound = ctx.options
    V, K = v.shape[-1], k.shape[-1]
    columns = -2 if ctx.state_v_first else -1
    identity = torch.ones_like(dM).tril().triu()  # a DTensor where dM is one
    initial_state = torch.cat((torch.zeros_like(dB), identity), columns)
    needed = [bool(n) for n in ctx.needs_input_grad[:6]]
    needed += [False] * (6 - len(needed))  # trailing arguments left at their defaults are not in the list
    values = F.pad(v, (0, K))
    _, *grads, _ = chunk_kda_backward.op(
        chunk_kda_backward.cotangent(None, values), torch.cat((dB, dM), columns), k, k, values, g, beta, A_log, dt_bias,
        initial_state, cu_seqlens, None, l2norm, gate, sigmoid, negative, lower_bound, ctx.state_v_first, False,
        [False, *needed, False],
    )  # fmt: skip
    dk, dv, *rest = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    dv = None if dv is None else padding.narrowed(dv, dv.shape[-2], V)
    return (dk, dv, *rest, *[None] * (len(Arguments._fields) - 6))


op.register_autograd(_backward, setup_context=_setup_context)
