"""What autocast, forward-mode derivatives, ``torch.vmap`` and torch's FLOP counter do with the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from flashkda_ops.ops import (
    chunk_kda,
    chunk_kda_backward,
    chunk_kda_paged,
    chunk_kda_transition,
    recurrent_kda_paged,
)

__all__ = [
    "TransformedChunkKDA",
    "autocast",
    "count_as_forward",
    "refuse_derivatives",
    "refuse_forward_mode",
    "refuse_vmap",
    "without_gradient",
]

_FORWARD = (chunk_kda, chunk_kda_paged, recurrent_kda_paged)

# ---------------------------------------------------------------------------------------------------------------------
# Autocast: torch.library.register_autocast would cast A_log, dt_bias and the states too
# ---------------------------------------------------------------------------------------------------------------------

_AUTOCAST_DEVICES = ("cpu", "cuda")
_HALVES = (torch.bfloat16, torch.float16)


def autocast(args: Sequence[Any], tokens: int = 3) -> tuple[Any, ...]:
    """The arguments of a forward op with ``q, k, v`` (``k, v`` of two tokens) in the dtype of autocast, where it is on.

    ``g`` and ``beta`` stay fp32 where they are, which every op takes beside 16 bits; so do ``A_log``, ``dt_bias`` and
    the states. As with torch's own ops fp64 is not cast, nor is what is no floating-point number.
    """
    device = args[0].device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tuple(args)
    dtype = torch.get_autocast_dtype(device)
    cast = (x.to(dtype) if x.dtype in (*_HALVES, torch.float32) else x for x in args[:tokens])
    gates = (x.to(dtype) if x.dtype in _HALVES else x for x in args[tokens : tokens + 2])
    return (*cast, *gates, *args[tokens + 2 :])


def _autocast_kernel(op: Any, tokens: int | None, device: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        if tokens is not None:
            args = autocast(args, tokens)
        with torch.autocast(device, enabled=False):
            return op(*args)

    return kernel


_library = torch.library.Library("flashkda", "FRAGMENT")
for _op, _tokens in (
    *((_module.op, 3) for _module in _FORWARD),
    (chunk_kda_transition.op, 2),
    (chunk_kda_backward.op, None),  # takes what the forward op has cast
):
    for _device in _AUTOCAST_DEVICES:
        _overload = _op._opoverload
        _library.impl(_overload._opname, _autocast_kernel(_overload, _tokens, _device), f"Autocast{_device.upper()}")


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives that the ops do not have: torch.library.custom_op drops tangents without a word, and takes no formula, not
# even one that raises, for an op that writes into its arguments
# ---------------------------------------------------------------------------------------------------------------------

_AUTOGRAD_DEVICES = ("CPU", "CUDA", "MPS", "XPU", "Meta", "PrivateUse1")


def has_tangent(x: object) -> bool:
    """Whether x is a tensor that carries a forward-mode derivative."""
    if forward_ad._current_level < 0 or not isinstance(x, Tensor):
        return False
    return forward_ad.unpack_dual(x, level=0).tangent is not None  # torch has no second level


def _no_forward_mode(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} has no forward-mode derivative (torch.func.jvp, linearize and jacfwd, torch.autograd.forward_ad)"
    )


def refuse_forward_mode(name: str, args: Sequence[object]) -> None:
    """Raises where one of the arguments carries a forward-mode derivative."""
    if any(map(has_tangent, args)):
        raise _no_forward_mode(name)


def _no_gradient(name: str) -> RuntimeError:
    return RuntimeError(f"{name} has no gradient: it is for inference, flashkda_ops.chunk_kda for training")


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, cause: Tensor) -> Tensor:
        ctx.name = name
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> NoReturn:
        raise _no_gradient(ctx.name)


def without_gradient(name: str, x: Tensor, cause: Tensor) -> Tensor:
    """A copy of x, whose backward pass says that what it was computed by, as was ``cause``, has none."""
    copy: Tensor = _WithoutGradient.apply(name, x.detach(), cause)
    return copy


def _autograd_kernel(op: Any, formula: Any) -> Callable[..., Any]:
    overload = op._opoverload
    name, autograd = overload._schema.name, make_autograd_impl(overload, formula)

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_forward_mode(name, args)
        if (
            torch._C._are_functorch_transforms_active()
            and torch.is_grad_enabled()
            and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        ):
            if formula is not op:
                raise _no_gradient(name)
            raise RuntimeError(
                f"torch.func cannot differentiate {name} as an op: call flashkda_ops.chunk_kda, without torch.compile"
            )
        return autograd(keyset, *args)

    return kernel


def _register_autograd_kernel(op: Any, formula: Any) -> None:
    # Those of a device are found before the one of custom_op, which is for all of them.
    kernel = _autograd_kernel(op, formula)
    for device in _AUTOGRAD_DEVICES:
        _library.impl(op._opoverload._opname, kernel, f"Autograd{device}", with_keyset=True)


def refuse_derivatives(op: Any) -> None:
    """The rule of an op that has no gradient: to ask for one is an error that says so."""
    name = op._opoverload._schema.name

    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise _no_gradient(name)

    _register_autograd_kernel(op, Info(backward, None))


for _module in (chunk_kda, chunk_kda_backward, chunk_kda_transition):
    _register_autograd_kernel(_module.op, _module.op)  # its own formula, from register_autograd
for _module in (chunk_kda_paged, recurrent_kda_paged):
    refuse_derivatives(_module.op)

# ---------------------------------------------------------------------------------------------------------------------
# vmap: the mapped dimension becomes a part of the batch, or of the heads where the samples cannot share a batch
# ---------------------------------------------------------------------------------------------------------------------

_BATCH = {name: 0 for name in ("q", "k", "v", "g", "beta", "initial_state", "do", "dht")}
_HEADS = {
    **dict.fromkeys(("q", "k", "v", "g", "beta", "do"), 2),
    **dict.fromkeys(("A_log", "dt_bias"), 0),
    **dict.fromkeys(("initial_state", "dht"), 1),
}


def _fold(
    call: Any, in_dims: Sequence[int | None], samples: int, own_gates: bool = False
) -> tuple[Any, dict[str, int]]:
    """The call with all samples in it, and where each argument has them.

    Packed sequences have a batch of one, and a batch shares ``A_log`` and ``dt_bias`` and sums their gradients.
    """
    dims = dict(zip(call._fields, in_dims, strict=False))
    if dims.get("cu_seqlens") is not None:
        raise ValueError("cu_seqlens must be the same for all samples of torch.vmap: the mapped calls have one layout")
    own_gates = own_gates or dims.get("A_log") is not None or dims.get("dt_bias") is not None
    where = _HEADS if own_gates or call.cu_seqlens is not None else _BATCH
    folded = {}
    for name, at in where.items():
        x = getattr(call, name) if name in call._fields else None
        if x is not None:
            dim = dims.get(name)
            x = torch.stack([x] * samples, at) if dim is None else x.movedim(dim, at)
            folded[name] = x.flatten(at, at + 1)
    return call._replace(**folded), where


def _unfold(x: Tensor, at: int, samples: int) -> Tensor:
    return x.unflatten(at, (samples, x.shape[at] // samples))


def _vmap_forward(function: Callable[..., Any], info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    call, where = _fold(chunk_kda.Arguments(*args), in_dims, info.batch_size)
    dims = where["v"], where["initial_state"], where["v"]
    outputs = function(*call)
    return tuple(_unfold(x, at, info.batch_size) for x, at in zip(outputs, dims, strict=True)), dims


def _vmap_backward(function: Callable[..., Any], info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    call = chunk_kda_backward.Arguments(*args)
    wanted, names = call.output_mask, call._fields[2:10]
    call, where = _fold(call, in_dims, info.batch_size, own_gates=wanted[5] or wanted[6])
    dims = tuple(where[name] if want else 0 for name, want in zip(names, wanted, strict=True))
    outputs = (
        _unfold(x, at, info.batch_size) if want else x.new_empty(info.batch_size, 0)
        for x, at, want in zip(function(*call), dims, wanted, strict=True)
    )
    return tuple(outputs), dims


def _vmap_transition(function: Callable[..., Any], info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    call, where = _fold(chunk_kda_transition.Arguments(*args), in_dims, info.batch_size)
    dim = where["initial_state"]
    return tuple(_unfold(x, dim, info.batch_size) for x in function(*call)), (dim, dim)


_HAS_VMAP = hasattr(torch.library, "register_vmap")  # torch 2.5


def refuse_vmap(op: Any, written: str) -> None:
    """The rule of an op that writes into one of its arguments."""

    def rule(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise ValueError(f"{written} must not be under torch.vmap: it is updated in place. Map over the batch instead")

    if _HAS_VMAP:
        torch.library.register_vmap(op, rule)


if _HAS_VMAP:
    for _op, _rule in (
        (chunk_kda.op, _vmap_forward),
        (chunk_kda_backward.op, _vmap_backward),
        (chunk_kda_transition.op, _vmap_transition),
    ):
        torch.library.register_vmap(_op, lambda *args, _op=_op, _rule=_rule: _rule(_op, *args))
for _module in (chunk_kda_paged, recurrent_kda_paged):
    refuse_vmap(_module.op, "state_pool")


class TransformedChunkKDA(torch.autograd.Function):
    """``flashkda::chunk_kda`` under the transforms of ``torch.func``, which cannot differentiate a custom op."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.flashkda.chunk_kda.default(*args)

    setup_context = staticmethod(chunk_kda.setup_context)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dht: Tensor | None, dstates: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = chunk_kda.gradients(ctx, do, dht, _TransformedBackward.apply)
        return (*grads, *[None] * (len(chunk_kda.Arguments._fields) - len(grads)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise _no_forward_mode("flashkda::chunk_kda")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _vmap_forward(TransformedChunkKDA.apply, info, in_dims, *args)


class _TransformedBackward(torch.autograd.Function):
    """Its backward pass, which ``torch.func`` makes ready for differentiation whether or not it comes to that."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.flashkda.chunk_kda_backward.default(*args)

    setup_context = staticmethod(chunk_kda_backward.setup_context)
    backward = staticmethod(chunk_kda_backward.backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise _no_forward_mode("flashkda::chunk_kda_backward")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _vmap_backward(_TransformedBackward.apply, info, in_dims, *args)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs of the recurrence, which every algorithm for it computes in one form or another
# ---------------------------------------------------------------------------------------------------------------------


def _state_flops(v: Sequence[int], k: Sequence[int]) -> int:
    """A product of the state with a vector, or with a vector's outer product, for every token and value head."""
    B, T, HV, V = v
    return 2 * B * T * HV * V * k[-1]


def _forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 3 * _state_flops(v, k)  # S k, u k^T and S q


def _backward_flops(do: Any, dht: Any, q: Any, k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    products = 2 if do is None else 3
    return (2 * products + 2) * _state_flops(v, k)  # two for each, and the states once more, which were not kept


def _transition_flops(k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    rows = (*v[:3], v[3] + k[3])  # those of the state, of which B has V and M has K
    return 2 * _state_flops(rows, k)  # S k and u k^T


def count_as_forward(op: Any) -> None:
    """The formula of an op that takes ``q``, ``k`` and ``v`` first and returns outputs."""
    register_flop_formula(op._opoverload.overloadpacket)(_forward_flops)


for _module in _FORWARD:
    count_as_forward(_module.op)
register_flop_formula(torch.ops.flashkda.chunk_kda_backward)(_backward_flops)
register_flop_formula(torch.ops.flashkda.chunk_kda_transition)(_transition_flops)
