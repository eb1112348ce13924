"""``flashkda::chunk_kda_backward``: the gradients of ``flashkda::chunk_kda``, one node in a training graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from flashkda_ops import portable
from flashkda_ops.validation import Sizes, require, require_shape, state_shape, validate_state, validate_tokens

__all__ = ["op"]

# output_mask: which gradients to compute, of q, k, v, g, beta, A_log, dt_bias, initial_state. The others are empty.
SCHEMA = (
    "(Tensor? do, Tensor? dht, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens, float? scale, bool use_qk_l2norm_in_kernel, bool use_gate_in_kernel, "
    "bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, float? lower_bound, bool state_v_first, "
    "bool batch_invariant, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _validate(
    do: Tensor | None,
    dht: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
    output_mask: Sequence[bool],
) -> Sizes:
    s = validate_tokens(
        q, k, v, g, beta, A_log, dt_bias, cu_seqlens,
        use_gate_in_kernel=use_gate_in_kernel, use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval, lower_bound=lower_bound,
    )  # fmt: skip
    validate_state("initial_state", initial_state, q, s, state_v_first)
    validate_state("dht", dht, q, s, state_v_first)
    if do is not None:
        require_shape("do", do, "B, T, HV, V", s.B, s.T, s.HV, s.V)
        require(do.dtype == v.dtype, lambda: f"do must be {v.dtype} as v is, got {do.dtype}")
        require(do.device == v.device, lambda: f"do must be on {v.device} as v is, got {do.device}")
    if len(output_mask) != 8:
        raise ValueError(f"output_mask must have 8 entries, got {len(output_mask)}")
    for name, x, wanted in zip(
        ("A_log", "dt_bias", "initial_state"), (A_log, dt_bias, initial_state), output_mask[5:], strict=True
    ):
        if wanted and x is None:
            raise ValueError(f"output_mask must not ask for the gradient of {name}, which is None")
    return s


@torch.library.custom_op("flashkda::chunk_kda_backward", mutates_args=(), schema=SCHEMA)
def op(
    do: Tensor | None,
    dht: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
    batch_invariant: bool,
    output_mask: Sequence[bool],
) -> _Grads:
    _validate(
        do, dht, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first, output_mask,
    )  # fmt: skip
    options = portable.KdaOptions(
        q.shape[-1] ** -0.5 if scale is None else scale,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        lower_bound,
    )
    grads = portable.chunk_kda_backward(
        do, dht, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options,
        state_v_first=state_v_first,
    )  # fmt: skip
    return _tuple(
        [
            grad if wanted and grad is not None else q.new_empty(0)
            for grad, wanted in zip(grads, output_mask, strict=True)
        ]
    )


def _tuple(grads: list[Tensor]) -> _Grads:
    q, k, v, g, beta, A_log, dt_bias, initial_state = grads
    return q, k, v, g, beta, A_log, dt_bias, initial_state


@op.register_fake
def _fake(
    do: Tensor | None,
    dht: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
    batch_invariant: bool,
    output_mask: Sequence[bool],
) -> _Grads:
    s = _validate(
        do, dht, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first, output_mask,
    )  # fmt: skip
    state = state_shape(s, s.N, state_v_first)
    inputs = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    shapes = [tuple(x.shape) if x is not None else () for x in inputs[:7]] + [state]
    return _tuple(
        [
            x.new_empty(shape) if wanted and x is not None else q.new_empty(0)
            for x, shape, wanted in zip(inputs, shapes, output_mask, strict=True)
        ]
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Grads) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("flashkda::chunk_kda has no second derivative: its backward pass cannot be differentiated")


op.register_autograd(_no_second_derivative, setup_context=_setup_context)
