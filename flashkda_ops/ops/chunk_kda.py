"""``flashkda::chunk_kda``: prefill and training over whole sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashkda_ops import cuda, portable
from flashkda_ops.ops import chunk_kda_backward
from flashkda_ops.validation import (
    Sizes,
    check_cu_seqlens,
    checks_values,
    state_dtype,
    state_shape,
    validate_checkpoint_interval,
    validate_state,
    validate_tokens,
)

__all__ = ["FORWARD_ARGS", "backward", "compute", "op", "setup_context"]

# The outputs that were not asked for, final state and intermediate states, have no rows.
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log=None, Tensor? dt_bias=None, "
    "Tensor? initial_state=None, Tensor? cu_seqlens=None, float? scale=None, bool output_final_state=False, "
    "bool use_qk_l2norm_in_kernel=False, bool use_gate_in_kernel=False, bool use_beta_sigmoid_in_kernel=False, "
    "bool allow_neg_eigval=False, float? lower_bound=None, bool state_v_first=False, int checkpoint_interval=0, "
    "bool batch_invariant=False, bool validate=False) -> (Tensor, Tensor, Tensor)"
)
FORWARD_ARGS = 20
"""Arguments of the schema."""


def _validate(
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
    checkpoint_interval: int,
) -> Sizes:
    sizes = validate_tokens(
        q, k, v, g, beta, A_log, dt_bias, cu_seqlens,
        use_gate_in_kernel=use_gate_in_kernel, use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval, lower_bound=lower_bound,
    )  # fmt: skip
    validate_state("initial_state", initial_state, q, sizes, state_v_first)
    validate_checkpoint_interval(checkpoint_interval)
    return sizes


@torch.library.custom_op("flashkda::chunk_kda", mutates_args=(), schema=SCHEMA)
def op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    checkpoint_interval: int = 0,
    batch_invariant: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _validate(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, use_gate_in_kernel, use_beta_sigmoid_in_kernel,
        allow_neg_eigval, lower_bound, state_v_first, checkpoint_interval,
    )  # fmt: skip
    if checks_values(validate, q):
        check_cu_seqlens(cu_seqlens, sizes.T)
    options = portable.KdaOptions(
        sizes.K**-0.5 if scale is None else scale,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        lower_bound,
    )
    return compute(
        sizes, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options,
        output_final_state=output_final_state, state_v_first=state_v_first, checkpoint_interval=checkpoint_interval,
        batch_invariant=batch_invariant,
    )  # fmt: skip


def compute(
    sizes: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: portable.KdaOptions,
    *,
    output_final_state: bool,
    state_v_first: bool,
    checkpoint_interval: int,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on arguments that are valid: by the kernel where it serves them, else on the portable path."""
    if (
        q.is_cuda
        and checkpoint_interval == 0
        and cuda.chunk_kda_reason(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens) is None
    ):
        o = v.new_empty(sizes.B, sizes.T, sizes.HV, sizes.V)
        rows = sizes.N if output_final_state else 0
        final_state = v.new_empty(state_shape(sizes, rows, state_v_first), dtype=torch.float32)
        cuda.chunk_kda(
            o, final_state if output_final_state else None, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens,
            scale=options.scale, use_qk_l2norm_in_kernel=options.use_qk_l2norm_in_kernel,
            use_gate_in_kernel=options.use_gate_in_kernel,
            use_beta_sigmoid_in_kernel=options.use_beta_sigmoid_in_kernel, allow_neg_eigval=options.allow_neg_eigval,
            lower_bound=options.lower_bound, state_v_first=state_v_first, batch_invariant=batch_invariant,
        )  # fmt: skip
        states = None
    else:
        o, final_state, states = portable.chunk_kda(
            q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options,
            state_v_first=state_v_first, checkpoint_interval=checkpoint_interval,
        )  # fmt: skip
        if not output_final_state:
            final_state = final_state.new_empty(state_shape(sizes, 0, state_v_first))
    if states is None:
        states = final_state.new_empty(sizes.B, *state_shape(sizes, 0, state_v_first))
    return o, final_state, states


@op.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    checkpoint_interval: int = 0,
    batch_invariant: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _validate(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, use_gate_in_kernel, use_beta_sigmoid_in_kernel,
        allow_neg_eigval, lower_bound, state_v_first, checkpoint_interval,
    )  # fmt: skip
    checkpoints = 0
    if checkpoint_interval:
        packed = cu_seqlens is not None
        checkpoints = portable.num_checkpoints(sizes.T, sizes.N, checkpoint_interval, packed=packed)
    dtype = state_dtype(q)
    return (
        v.new_empty(sizes.B, sizes.T, sizes.HV, sizes.V),
        v.new_empty(state_shape(sizes, sizes.N if output_final_state else 0, state_v_first), dtype=dtype),
        v.new_empty(sizes.B, *state_shape(sizes, checkpoints, state_v_first), dtype=dtype),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Save what the backward pass needs: the inputs, and which of the options shape the gradients."""
    ctx.save_for_backward(*inputs[:9])
    ctx.options = (inputs[9], *inputs[11:17], inputs[18])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def backward(ctx: Any, do: Tensor | None, dht: Tensor | None, _dstates: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the eight differentiable arguments, each only where asked for, then ``None`` for the rest."""
    needed = [bool(n) for n in ctx.needs_input_grad[:8]]
    needed += [False] * (8 - len(needed))  # trailing arguments left at their defaults are not in the list
    if dht is not None and dht.shape[0] == 0:
        dht = None  # the final state was not asked for
    grads = chunk_kda_backward.op(do, dht, *ctx.saved_tensors, *ctx.options, needed)
    kept = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return (*kept, *[None] * (FORWARD_ARGS - 8))


op.register_autograd(backward, setup_context=setup_context)
