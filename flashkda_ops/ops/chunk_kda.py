"""``flashkda::chunk_kda``: prefill and training over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkda_ops import cuda, padding, portable, segments
from flashkda_ops.ops import chunk_kda_backward, plans
from flashkda_ops.ops.plans import Plan
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

__all__ = ["Arguments", "gradients", "op", "plan", "run", "save", "setup_context"]

# Outputs that were not asked for, final state and intermediate states, have no rows.
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log=None, Tensor? dt_bias=None, "
    "Tensor? initial_state=None, Tensor? cu_seqlens=None, float? scale=None, bool output_final_state=False, "
    "bool use_qk_l2norm_in_kernel=False, bool use_gate_in_kernel=False, bool use_beta_sigmoid_in_kernel=False, "
    "bool allow_neg_eigval=False, float? lower_bound=None, bool state_v_first=False, int checkpoint_interval=0, "
    "bool batch_invariant=False, bool validate=False) -> (Tensor, Tensor, Tensor)"
)
_Outputs = tuple[Tensor, Tensor, Tensor]
_Computed = tuple[Tensor, Tensor | None, Tensor | None]


class Arguments(NamedTuple):
    """The arguments of the schema, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    lower_bound: float | None = None
    state_v_first: bool = False
    checkpoint_interval: int = 0
    batch_invariant: bool = False
    validate: bool = False


def _validate(a: Arguments) -> Sizes:
    sizes = validate_tokens(a)
    validate_state("initial_state", a.initial_state, a.q, sizes, a.state_v_first)
    validate_checkpoint_interval(a.checkpoint_interval)
    return sizes


def plan(a: Arguments, reading: cuda.Reading | None = None) -> Plan:
    return plans.plan(a[:9], (a.scale, *a[11:17]), reading)


def run(a: Arguments, reading: cuda.Reading | None = None) -> _Computed:
    """The op, with None for what was not asked for: by the kernel where it serves the call, or on the portable path.

    reading: of the first nine arguments, if they have been read.
    """
    sizes, options, kernel, (n, _), padded = plan(a, reading)
    validate_checkpoint_interval(a.checkpoint_interval)
    if checks_values(a.validate, a.q):
        check_cu_seqlens(a.cu_seqlens, sizes.T)
    if padded and a.checkpoint_interval == 0:
        o, state, _ = run(padding.widened(a, options.scale)._replace(validate=False))
        o = padding.narrowed(o, sizes.HV, sizes.V)
        return o, None if state is None else padding.narrowed_state(state, sizes, a.state_v_first), None
    if kernel is None or a.checkpoint_interval != 0:
        with torch._C._AutoDispatchBelowAutograd():  # of many operators, none of which has a gradient to keep
            o, state, states = portable.chunk_kda(
                *a[:9], options, state_v_first=a.state_v_first, output_final_state=a.output_final_state,
                checkpoint_interval=a.checkpoint_interval, batch_invariant=a.batch_invariant,
            )  # fmt: skip
        return o, state if a.output_final_state else None, states
    if n > 1 and a.cu_seqlens is not None and not a.batch_invariant:  # the kernel cuts dense calls itself
        return _in_segments(a, n)
    o, final_state = torch.empty_like(a.v, memory_format=torch.contiguous_format), None
    if a.output_final_state:
        final_state = o.new_empty(*state_shape(sizes, sizes.N, a.state_v_first), dtype=torch.float32)
    addresses = None if reading is None else reading[2]
    cuda.chunk_kda(kernel, o, final_state, a[:9], batch_invariant=a.batch_invariant, addresses=addresses)
    return o, final_state, None


@torch.no_grad()
def _in_segments(a: Arguments, n: int) -> _Computed:
    """A packed call, its row cut in ``n`` segments side by side."""
    layout = segments.layout(a.q, a.cu_seqlens, n)
    with torch.autocast(a.q.device.type, enabled=False):  # maps are composed in fp32
        _, initial = segments.entered(layout, a[1:5], segments.Gates.of(a), a.initial_state, a.state_v_first)
        pieces = a._replace(initial_state=initial, cu_seqlens=layout.cu_seqlens, batch_invariant=True, validate=False)
        o, final_states, _ = op(*pieces)
    return o, layout.final_states(final_states) if a.output_final_state else None, None


@torch.library.custom_op("flashkda::chunk_kda", mutates_args=(), schema=SCHEMA)
def op(*args: Any) -> _Outputs:
    a = Arguments(*args)
    o, final_state, states = run(a)
    return (
        o,
        _no_states(a) if final_state is None else final_state,
        _no_states(a, o.shape[0]) if states is None else states,
    )


def _no_states(a: Arguments, *batch: int) -> Tensor:
    (HV, V), K = a.v.shape[2:], a.q.shape[3]
    return a.v.new_empty(*batch, 0, HV, *((V, K) if a.state_v_first else (K, V)), dtype=state_dtype(a.q))


@op.register_fake
def _fake(*args: Any) -> _Outputs:
    a = Arguments(*args)
    s = _validate(a)
    checkpoints = 0
    if a.checkpoint_interval:
        packed = a.cu_seqlens is not None
        checkpoints = portable.num_checkpoints(s.T, s.N, a.checkpoint_interval, packed=packed)
    dtype = state_dtype(a.q)
    return (
        a.v.new_empty(s.B, s.T, s.HV, s.V),
        a.v.new_empty(state_shape(s, s.N if a.output_final_state else 0, a.state_v_first), dtype=dtype),
        a.v.new_empty(s.B, *state_shape(s, checkpoints, a.state_v_first), dtype=dtype),
    )


def save(ctx: Any, a: Arguments) -> None:
    """Save what the backward pass needs: the inputs, and which of the options shape the gradients."""
    ctx.save_for_backward(*a[:9])
    ctx.options = (a.scale, *a[11:17], a.batch_invariant)
    ctx.set_materialize_grads(False)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    save(ctx, Arguments(*inputs))
    ctx.mark_non_differentiable(output[2])


def gradients(
    ctx: Any, do: Tensor | None, dht: Tensor | None, op: Callable[..., Sequence[Tensor | None]]
) -> list[Tensor | None]:
    """Gradients of the eight differentiable arguments by ``op``, each only where asked for."""
    needed = list(ctx.needs_input_grad[:8])
    needed += [False] * (8 - len(needed))  # trailing arguments left at their defaults are not in the list
    if dht is not None and dht.shape[0] == 0:
        dht = None  # the final state was not asked for
    grads = op(do, dht, *ctx.saved_tensors, *ctx.options, needed)
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


def backward(ctx: Any, do: Tensor | None, dht: Tensor | None, _dstates: Tensor | None) -> tuple[Tensor | None, ...]:
    do = chunk_kda_backward.cotangent(do, ctx.saved_tensors[2])
    return (*gradients(ctx, do, dht, chunk_kda_backward.op), *[None] * (len(Arguments._fields) - 8))


op.register_autograd(backward, setup_context=setup_context)
