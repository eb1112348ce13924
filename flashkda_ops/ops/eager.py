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

from flashkda_ops.ops import chunk_kda as _chunk
from flashkda_ops.ops import chunk_kda_backward as _chunk_backward
from flashkda_ops.ops import chunk_kda_paged as _chunk_paged
from flashkda_ops.ops import recurrent_kda_paged as _recurrent_paged
from flashkda_ops.ops import rules

__all__ = ["EagerChunkKDA", "chunk_kda", "chunk_kda_paged", "in_place", "recurrent_kda_paged"]

_Tensors = Sequence[Tensor | None]
_A = TypeVar("_A", bound=tuple[Any, ...])
_R = TypeVar("_R")


def _is_watched() -> bool:
    """Whether ops go to more than kernels in this thread: to a compiler, a mode, a transform, a tracer, a profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _are_plain(tensors: _Tensors) -> bool:
    """Whether all are storage, sizes and strides: no subclass, no negation still to be done."""
    for x in tensors:
        if x is not None and ((type(x) is not Tensor and type(x) is not torch.nn.Parameter) or x.is_neg()):
            return False
    return True


def _need_grad(tensors: _Tensors) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def _is_autocast(q: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(q.device.type)


class EagerChunkKDA(torch.autograd.Function):
    """``flashkda::chunk_kda`` in training: the op's own formula. Takes the tensors, the other arguments as one, and
    whether to leave out the dispatcher; returns the outputs that were asked for."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, options, direct = args
        a = _chunk.Arguments(*tensors, *options)
        with torch._C._AutoDispatchBelowAutograd():
            o, final_state, _ = _chunk.run(a) if direct else _chunk.op(*a)
        _chunk.save(ctx, a)
        return o, final_state if a.output_final_state else None

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None) -> tuple[Tensor | None, ...]:
        direct = (
            not _is_watched()
            and not torch.is_grad_enabled()
            and not torch._C._is_any_autocast_enabled()
            and _are_plain((do, dht))
        )
        return (*_chunk.gradients(ctx, do, dht, _backward if direct else _chunk_backward.op), None, None, None)


def _backward(*args: Any) -> Sequence[Tensor | None]:
    """``flashkda::chunk_kda_backward`` of what the forward pass has validated, and autograd made to fit its outputs."""
    with torch._C._AutoDispatchBelowAutograd():
        return _chunk_backward.compute(_chunk_backward.Arguments(*args))


def chunk_kda(*args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``flashkda::chunk_kda``. What was not asked for is None, or has no rows."""
    q, tensors = args[0], args[:9]
    if q.is_meta or not _are_plain(tensors):
        return _chunk.op(*args)
    if _is_autocast(q):
        args = rules.autocast(args)
        with torch.autocast(q.device.type, enabled=False):
            return chunk_kda(*args)
    direct = not _is_watched()
    if _need_grad(tensors):
        return (*EagerChunkKDA.apply(*tensors, args[9:], direct), None)
    if not direct:
        return _chunk.op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _chunk.run(_chunk.Arguments(*args))


def in_place(op: Callable[..., _R], run: Callable[[_A], _R], a: _A, tensors: _Tensors, written: _Tensors) -> _R:
    """``op(*a)`` for an op that has no gradient and writes into tensors of its own; ``run(a)`` is its body."""
    q = a[0]
    if _is_watched() or q.is_meta or _is_autocast(q) or not _are_plain(tensors) or _need_grad(tensors):
        return op(*a)
    torch.autograd.graph.increment_version([x for x in written if x is not None])
    with torch._C._AutoDispatchBelowAutograd():
        return run(a)


def chunk_kda_paged(*args: Any) -> Tensor:
    a = _chunk_paged.Arguments(*args)
    return in_place(_chunk_paged.op, _chunk_paged.run, a, (*a[:11], *a[20:]), (a.state_pool,))


def recurrent_kda_paged(*args: Any) -> Tensor:
    a = _recurrent_paged.Arguments(*args)
    return in_place(_recurrent_paged.op, _recurrent_paged.run, a, a[:11], (a.state_pool,))
