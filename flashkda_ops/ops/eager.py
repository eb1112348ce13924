"""Plain eager calls: the bodies of the ops, without the dispatcher where it would do no more than find them.

On its way to the body of a ``custom_op`` a call goes through Python once for autograd, once for the version counters of
what is mutated and once for the backend, with all arguments boxed and unboxed each time: several times what the body
costs on the host. What the dispatcher is there for is what the functions here look for first: tensors that are more
than storage, sizes and strides, and whatever may watch or rewrite ops in this thread. They take the arguments of the
op, by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashkda_ops import cuda
from flashkda_ops.ops import chunk_kda as _chunk
from flashkda_ops.ops import chunk_kda_backward as _chunk_backward
from flashkda_ops.ops import chunk_kda_paged as _chunk_paged
from flashkda_ops.ops import recurrent_kda_paged as _recurrent_paged
from flashkda_ops.ops import rules
from flashkda_ops.validation import require_types

__all__ = [
    "EagerChunkKDA",
    "chunk_kda",
    "chunk_kda_paged",
    "in_place",
    "recurrent_kda_paged",
    "transformed_chunk_kda",
]

_Tensors = tuple[Tensor | None, ...]
_A = TypeVar("_A", bound=tuple[Any, ...])
_R = TypeVar("_R")
_NUMBERS = frozenset((bool, int, float, type(None)))
UNEXPLAINED = (AttributeError, TypeError, RuntimeError)
"""What an argument of another type ends in, among other things."""


def _is_watched() -> bool:
    """Whether ops go to more than kernels in this thread: to a compiler, a mode, a transform, a tracer, a profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0  # torch.autograd.forward_ad, whose tensors are of the plain type
    )


def _are_numbers(options: Sequence[object]) -> bool:
    """Whether all options are what the schema says, which else converts or refuses them."""
    if _NUMBERS.issuperset(map(type, options)):
        return True
    refuse_gradients(options)
    return False


def refuse_gradients(options: Sequence[object]) -> None:
    """Raises where an option is a tensor with a derivative, which its conversion to a number would lose."""
    for x in options:
        if isinstance(x, Tensor) and (x.requires_grad or rules.has_tangent(x)):
            raise ValueError(
                "scale and lower_bound must be numbers: they have no gradient, got a Tensor that asks for it"
            )


def _is_autocast(q: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(q.device.type)


class EagerChunkKDA(torch.autograd.Function):
    """``flashkda::chunk_kda`` in training: the op's own formula. Takes the tensors, all arguments once more as one, and
    what was read of the tensors, or None to go by the dispatcher; returns the outputs that were asked for."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        a, reading = args[9:]
        if reading is None:
            with torch._C._AutoDispatchBelowAutograd():
                o, final_state, _ = _chunk.op(*a)
        else:
            o, final_state, _ = _chunk.run(a, reading)
        _chunk.save(ctx, a)
        return o, final_state if a.output_final_state else None

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Tensor | None, ...]:
        direct = (
            not _is_watched()
            and not torch.is_grad_enabled()
            and not torch._C._is_any_autocast_enabled()
            and cuda.read((do, dht)) is not None
        )
        return (*_chunk.gradients(ctx, do, dht, _backward if direct else _chunk_backward.op), None, None, None)

    jvp = staticmethod(rules.TransformedChunkKDA.jvp)


# Function.apply itself first looks for what transforms have left behind, which cuda.read has done.
_train = super(torch.autograd.Function, EagerChunkKDA).apply


def _backward(*args: Any) -> Sequence[Tensor | None]:
    """``flashkda::chunk_kda_backward`` of what the forward pass has validated, and autograd made to fit its outputs."""
    with torch._C._AutoDispatchBelowAutograd():
        return _chunk_backward.run(_chunk_backward.Arguments(*args))


def chunk_kda(*args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``flashkda::chunk_kda``. What was not asked for is None, or has no rows."""
    q, tensors = args[0], args[:9]
    try:
        reading = cuda.read(tensors)
        if not _are_numbers(args[9:]) or reading is None or q.is_meta:
            return _chunk.op(*args)
        if _is_autocast(q):
            args = rules.autocast(args)
            with torch.autocast(q.device.type, enabled=False):
                return chunk_kda(*args)
        is_watched, a = _is_watched(), _chunk.Arguments._make(args)
        if reading[1] and torch.is_grad_enabled():
            return (*_train(*tensors, a, None if is_watched else reading), None)
        if is_watched:
            return _chunk.op(*args)
        return _chunk.run(a, reading)
    except UNEXPLAINED as error:
        require_types(_chunk.op, args, error)
        raise


def transformed_chunk_kda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same under the transforms of ``torch.func``."""
    refuse_gradients(args[9:])
    try:
        outputs: tuple[Tensor, Tensor, Tensor] = rules.TransformedChunkKDA.apply(*rules.autocast(args))
        return outputs
    except UNEXPLAINED as error:
        require_types(_chunk.op, args, error)
        raise


def in_place(
    op: Any,
    run: Callable[[_A], _R],
    a: _A,
    tensors: _Tensors,
    options: Sequence[object],
    written: _Tensors,
) -> _R:
    """``op(*a)`` for an op that has no gradient and writes into some of its tensors; ``run(a)`` is its body."""
    q = a[0]
    try:
        reading = cuda.read(tensors)
        if (
            not _are_numbers(options)
            or reading is None
            or (reading[1] and torch.is_grad_enabled())
            or _is_watched()
            or q.is_meta
            or _is_autocast(q)
        ):
            return op(*a)
        for x in written:
            if x is not None:
                torch.autograd.graph.increment_version(x)
        with torch._C._AutoDispatchBelowAutograd():
            return run(a)
    except UNEXPLAINED as error:
        require_types(op, a, error)
        raise


def chunk_kda_paged(*args: Any) -> Tensor:
    a = _chunk_paged.Arguments(*args)
    return in_place(_chunk_paged.op, _chunk_paged.run, a, (*a[:11], *a[20:]), a[11:20], (a.state_pool,))


def recurrent_kda_paged(*args: Any) -> Tensor:
    a = _recurrent_paged.Arguments(*args)
    return in_place(_recurrent_paged.op, _recurrent_paged.run, a, a[:11], a[11:], (a.state_pool,))
