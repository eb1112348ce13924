"""FlashKDA's interface: ``flash_kda.fwd`` with its signature, and what makes ``import flash_kda`` find it.

::

    from flashkda_ops.integrations import flash_kda

    flash_kda.install()

Engines that call FlashKDA (https://github.com/MoonshotAI/FlashKDA), fla's backend of that name among them, then run on
the kernels of this package unmodified. Each process installs for itself.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkda_ops import cuda
from flashkda_ops.integrations._replacements import Replacements, place_of
from flashkda_ops.integrations._signatures import Theirs
from flashkda_ops.ops import chunk_kda, eager, rules
from flashkda_ops.validation import (
    Sizes,
    check_cu_seqlens,
    checks_values,
    require_device,
    require_dtype,
    require_shape,
    require_tensor,
    state_dtype,
    state_shape,
    validate_tokens,
)

__all__ = ["fwd", "install", "uninstall"]

# An op of its own, since it writes into tensors of the caller: a copy of the output would cost a fifth of the time.
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor A_log, Tensor dt_bias, "
    "float lower_bound, Tensor? initial_state, Tensor(b!)? final_state, Tensor? cu_seqlens=None) -> ()"
)


class Arguments(NamedTuple):
    """The arguments of the schema, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float
    out: Tensor
    A_log: Tensor
    dt_bias: Tensor
    lower_bound: float
    initial_state: Tensor | None = None
    final_state: Tensor | None = None
    cu_seqlens: Tensor | None = None


def _call(a: Arguments) -> chunk_kda.Arguments:
    """What FlashKDA always does, said in the options of ``flashkda::chunk_kda``; states are V first."""
    return chunk_kda.Arguments(
        a.q, a.k, a.v, a.g, a.beta, a.A_log, a.dt_bias, None, a.cu_seqlens, a.scale, a.final_state is not None,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        lower_bound=a.lower_bound, state_v_first=True,
    )  # fmt: skip


def _validate(a: Arguments, call: chunk_kda.Arguments) -> Sizes:
    for name, x in (("A_log", a.A_log), ("dt_bias", a.dt_bias)):  # which chunk_kda can do without
        require_tensor(name, x)
    if a.lower_bound is None:
        raise ValueError("lower_bound must be a number in [-5, 0), got None")
    s = validate_tokens(call)
    require_shape("out", a.out, "B, T, HV, V", s.B, s.T, s.HV, s.V)
    require_dtype("out", a.out, (a.q.dtype,), a.q)
    require_device("out", a.out, a.q)
    dtypes = (torch.float64,) if a.q.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    for name, state in (("initial_state", a.initial_state), ("final_state", a.final_state)):
        if state is not None:
            require_shape(name, state, "N, HV, V, K", *state_shape(s, s.N, True))
            require_dtype(name, state, dtypes, a.q)
            require_device(name, state, a.q)
    return s


def _is_dense(x: Tensor) -> bool:
    """Whether a kernel can write x, as it writes what it is given newly allocated."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0


@torch.library.custom_op("flashkda::flash_kda_fwd", mutates_args=("out", "final_state"), schema=SCHEMA)
def op(*args: Any) -> None:
    _run(Arguments(*args))


def _run(a: Arguments) -> None:
    call = _call(a)
    sizes = _validate(a, call)
    if checks_values(False, a.q):
        check_cu_seqlens(a.cu_seqlens, sizes.T)
    initial, final = a.initial_state, a.final_state
    if initial is not None:
        if final is not None and initial.untyped_storage().data_ptr() == final.untyped_storage().data_ptr():
            initial = initial.clone()  # a state updated in place: a kernel may write before all have read
        call = call._replace(initial_state=initial.to(state_dtype(a.q)))
    kernel = chunk_kda.plan(call).kernel
    if (
        kernel is not None
        and _is_dense(a.out)
        and (final is None or (final.dtype == torch.float32 and _is_dense(final)))
    ):
        cuda.chunk_kda(kernel, a.out, final, call[:9], batch_invariant=False)
        return
    o, state, _ = chunk_kda.run(call)
    a.out.copy_(o)
    if final is not None:
        assert state is not None
        final.copy_(state)


@op.register_fake
def _fake(*args: Any) -> None:
    a = Arguments(*args)
    _validate(a, _call(a))


rules.refuse_vmap(op, "out")
rules.refuse_derivatives(op)
rules.count_as_forward(op)


@torch.no_grad()
def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    out: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float,
    initial_state: Tensor | None = None,
    final_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """``flash_kda.fwd``: writes ``out`` and ``final_state``. L2 norm, bounded gate and beta sigmoid are always applied.

    It takes all that FlashKDA's takes, and more: any strides, any device, ``K`` and ``V``, fp16 and fp32, ``g`` and
    ``beta`` in fp32, grouped value heads, int32 ``cu_seqlens``, one CUDA graph for any ``cu_seqlens``, and
    ``torch.compile``. No gradients, as there.

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``.
        g: ``[B, T, HV, K]``, the raw input of the gate.
        beta: ``[B, T, HV]``, before the sigmoid.
        scale: of ``q``.
        out: ``[B, T, HV, V]``, the dtype of ``q``. Written.
        A_log: ``[HV]``.
        dt_bias: ``[HV, K]`` or ``[HV * K]``.
        lower_bound: in ``[-5, 0)``.
        initial_state: ``[N, HV, V, K]``, fp32 or bf16. Zero by default.
        final_state: as ``initial_state``, which it may be. Written.
        cu_seqlens: ``[N + 1]``, see :func:`flashkda_ops.chunk_kda`.

    Raises:
        ValueError: naming the argument that is not as described.
    """
    if not hasattr(scale, "__float__"):
        raise ValueError(f"scale must be a number, got {'None' if scale is None else type(scale).__name__}")
    a = Arguments(
        q, k, v, g, beta, float(scale), out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens
    )
    if torch.compiler.is_compiling():
        torch.ops.flashkda.flash_kda_fwd.default(*a)
    else:
        eager.in_place(op, _run, a, (*a[:5], *a[6:9], *a[10:]), (a.scale, lower_bound), (out, final_state))


_logger = logging.getLogger(__name__)
_replaced = Replacements(_logger)
_made: ModuleType | None = None  # by install(), where there was none


def install() -> None:
    """Make ``import flash_kda`` find :func:`fwd`, whether FlashKDA is installed or not. Twice is once.

    In a FlashKDA that this process has imported already, ``fwd`` is replaced. A function that someone took out of it
    before (``from flash_kda import fwd``) stays what it was. The log reports parameters of FlashKDA's ``fwd`` that are
    not known here. With one that every call has to give it is left as it is; else the calls that give one run on it.

    Raises:
        ImportError: what this process has imported under that name has no ``fwd``.
    """
    global _made
    module = sys.modules.get("flash_kda")
    if module is None:
        module = _made = ModuleType("flash_kda", "FlashKDA's interface on the kernels of flashkda_ops.")
        module.__spec__ = ModuleSpec("flash_kda", None, origin=__name__)  # what importlib.util.find_spec returns
        module.fwd = fwd  # type: ignore[attr-defined]
        sys.modules["flash_kda"] = module
    elif module is not _made:
        if not hasattr(module, "fwd"):
            where = getattr(module, "__file__", None) or "made by other code"
            raise ImportError(f"the flash_kda that is imported ({where}) has no fwd: it is not FlashKDA")
        _replaced.put(module, "fwd", _in_place_of)
        _replaced.active = True
    _forget_specs()


def uninstall() -> None:
    """Undo :func:`install`: the next import finds FlashKDA itself, or nothing.

    FlashKDA's ``fwd`` is put back, unless someone has replaced ours since: then it is left as it is, and the log
    reports it. What was taken out of FlashKDA while ours was there hands its calls on to FlashKDA's ``fwd``; where
    FlashKDA had not been imported, it stays :func:`fwd`.
    """
    global _made
    _replaced.undo()
    if _made is not None and sys.modules.get("flash_kda") is _made:
        del sys.modules["flash_kda"]
        found = getattr(_made, "fwd", None)
        if found is not fwd:
            _logger.warning(
                "flash_kda.fwd was replaced by %s: it is gone with the module that install() had made", place_of(found)
            )
    _made = None
    _forget_specs()


def _in_place_of(theirs: Callable[..., None]) -> Callable[..., None]:
    """:func:`fwd`, for what it knows of FlashKDA's parameters; what is to stay where it cannot be replaced."""
    known = Theirs(theirs, fwd)
    if known.drift:
        _logger.warning(
            "fwd of the FlashKDA that is imported is not the one that flashkda_ops knows: %s. %s", known.drift,
            "It is left as it is" if known.drift.required else "What is not known is left to FlashKDA",
        )  # fmt: skip
    if known.drift.required:
        return theirs

    @functools.wraps(theirs, updated=())  # not the mark of a function that is not to be traced
    def standing_in(*args: Any, **kwargs: Any) -> None:
        if not _replaced.active:
            return theirs(*args, **kwargs)
        if known.drift:
            arguments = known.arguments(args, kwargs)
            if known.unknown(arguments) is not None:
                return theirs(*args, **kwargs)
            args, kwargs = (), {name: x for name, x in arguments.items() if name not in known.drift.optional}
        return fwd(*args, **kwargs)

    return standing_in


def _forget_specs() -> None:
    """fla remembers whether FlashKDA can be imported."""
    find_spec = getattr(sys.modules.get("fla.utils"), "find_spec_cached", None)
    forget = getattr(find_spec, "cache_clear", None)
    if forget is not None:
        forget()
