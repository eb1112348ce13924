"""``flashkda::chunk_kda_backward``: the gradients of ``flashkda::chunk_kda``, one node in a training graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flashkda_ops import cuda, padding, portable, segments
from flashkda_ops.ops import plans
from flashkda_ops.ops.plans import Plan
from flashkda_ops.validation import (
    Sizes,
    require_device,
    require_dtype,
    require_shape,
    state_dtype,
    state_shape,
    validate_state,
    validate_tokens,
)

__all__ = ["Arguments", "backward", "op", "run", "setup_context"]

# output_mask: which gradients to compute, of q, k, v, g, beta, A_log, dt_bias, initial_state. The others are empty.
SCHEMA = (
    "(Tensor? do, Tensor? dht, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens, float? scale, bool use_qk_l2norm_in_kernel, bool use_gate_in_kernel, "
    "bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, float? lower_bound, bool state_v_first, "
    "bool batch_invariant, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Arguments(NamedTuple):
    """The arguments of the schema, in its order."""

    do: Tensor | None
    dht: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float | None
    use_qk_l2norm_in_kernel: bool
    use_gate_in_kernel: bool
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    lower_bound: float | None
    state_v_first: bool
    batch_invariant: bool
    output_mask: Sequence[bool]


def _validate_cotangents(a: Arguments, s: Sizes) -> None:
    validate_state("dht", a.dht, a.q, s, a.state_v_first)
    do, v = a.do, a.v
    if do is not None:
        require_shape("do", do, "B, T, HV, V", s.B, s.T, s.HV, s.V)
        require_dtype("do", do, (v.dtype,), v, "v")
        require_device("do", do, v, "v")
    if len(a.output_mask) != 8:
        raise ValueError(f"output_mask must have 8 entries, got {len(a.output_mask)}")
    for name, wanted in zip(("A_log", "dt_bias", "initial_state"), a.output_mask[5:], strict=True):
        if wanted and getattr(a, name) is None:
            raise ValueError(f"output_mask must not ask for the gradient of {name}, which is None")


def _kept(grads: Sequence[Tensor | None], a: Arguments) -> _Gradients:
    """The gradients that were asked for, and empty tensors for the others."""
    q, k, v, g, beta, A_log, dt_bias, initial_state = (
        grad if wanted and grad is not None else a.q.new_empty(0)
        for grad, wanted in zip(grads, a.output_mask, strict=True)
    )
    return q, k, v, g, beta, A_log, dt_bias, initial_state


@torch.library.custom_op("flashkda::chunk_kda_backward", mutates_args=(), schema=SCHEMA)
def op(*args: Any) -> _Gradients:
    a = Arguments(*args)
    plan = plans.plan(a[2:11], a[11:18])
    _validate_cotangents(a, plan.sizes)
    return _kept(_compute(a, plan), a)


def cotangent(do: Tensor | None, v: Tensor) -> Tensor | None:
    """``do`` as the op takes it: of DTensors not None, since torch 2.11 looks for their mesh in the first argument."""
    return torch.zeros_like(v) if do is None and hasattr(v, "device_mesh") else do


def run(a: Arguments) -> Sequence[Tensor | None]:
    """The op on cotangents that fit. Gradients that were not asked for are None, or not to be used."""
    return _compute(a, plans.plan(a[2:11], a[11:18]))


def _compute(a: Arguments, plan: Plan) -> Sequence[Tensor | None]:
    """By the kernels where they serve the call, else on the portable path."""
    if plan.padded:
        return padding.narrowed_gradients(run(padding.widened(a, plan.options.scale)), a[2:10])
    if plan.kernel is None:
        if any(a.output_mask[:7]):
            return portable.chunk_kda_backward(
                *a[:11], plan.options, state_v_first=a.state_v_first, batch_invariant=a.batch_invariant
            )
        dh0 = portable.initial_state_gradient(
            *a[:9], a.cu_seqlens, plan.options, state_v_first=a.state_v_first, batch_invariant=a.batch_invariant
        )
        return [*[None] * 7, dh0]
    n = plan.segments[cuda.may_use_clusters()]
    if n > 1 and not a.batch_invariant:
        return _in_segments(a, plan.sizes, n)
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted and x is not None else None
        for x, wanted in zip(a[2:10], a.output_mask, strict=True)
    ]
    cuda.chunk_kda_backward(plan.kernel, grads, a.do, a.dht, a[2:11])
    return grads


@torch.no_grad()
def _in_segments(a: Arguments, s: Sizes, n: int) -> Sequence[Tensor | None]:
    """The same, ``n`` segments side by side: the scans of one long sequence of few heads leave most of a GPU idle."""
    layout = segments.layout(a.q, a.cu_seqlens, n)
    do = None if a.do is None else layout.tokens(a.do)
    tokens = [layout.tokens(x) for x in a[2:7]]
    parameters = (a.A_log, a.dt_bias)
    dht = a.dht
    if dht is None:
        dht = a.q.new_zeros(state_shape(s, s.N, a.state_v_first), dtype=state_dtype(a.q))
    with torch.autocast(a.q.device.type, enabled=False):  # maps are composed in fp32
        M, initial = segments.entered(layout, tokens[1:], segments.Gates.of(a), a.initial_state, a.state_v_first)
        grads = segments.gradients(layout, do, dht, (*tokens, *parameters), initial, M, a[11:18], a.output_mask)
    # Rows of a dense batch lie behind each other in the layout. To autograd these are no views: nobody else holds them.
    view, wanted = torch.ops.aten._unsafe_view, zip(grads, a[2:10], a.output_mask, strict=True)
    return [view(dx, x.shape) if needed and dx is not None and x is not None else None for dx, x, needed in wanted]


@op.register_fake
def _fake(*args: Any) -> _Gradients:
    a = Arguments(*args)
    sizes = validate_tokens(a)
    validate_state("initial_state", a.initial_state, a.q, sizes, a.state_v_first)
    _validate_cotangents(a, sizes)
    return _kept([None if x is None else x.new_empty(x.shape) for x in a[2:10]], a)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gradients) -> None:
    pass


def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("flashkda::chunk_kda has no second derivative: its backward pass cannot be differentiated")


op.register_autograd(backward, setup_context=setup_context)
