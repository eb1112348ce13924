"""FlashKDA's interface: ``flash_kda.fwd`` with its signature, and what makes ``import flash_kda`` find it.

::

    from flashkda_ops.integrations import flash_kda

    flash_kda.install()

Engines that call FlashKDA (https://github.com/MoonshotAI/FlashKDA), fla's backend of that name among them, then run on
the kernels of this package unmodified. Each process installs for itself.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashkda_ops import cuda
from flashkda_ops.ops import chunk_kda, eager, rules
from flashkda_ops.validation import (
    Sizes,
    check_cu_seqlens,
    checks_values,
    require_device,
    require_dtype,
    require_shape,
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
    a = Arguments(
        q, k, v, g, beta, float(scale), out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens
    )
    if torch.compiler.is_compiling():
        torch.ops.flashkda.flash_kda_fwd.default(*a)
    else:
        eager.in_place(op, _run, a, (*a[:5], *a[6:9], *a[10:]), (a.scale, lower_bound), (out, final_state))


_theirs: Any = None  # the fwd of a FlashKDA that was imported before install()


def _is_ours(module: ModuleType | None) -> bool:
    return module is not None and getattr(module, "fwd", None) is fwd


def install() -> None:
    """Make ``import flash_kda`` find :func:`fwd`, whether FlashKDA is installed or not. Twice is once.

    In a FlashKDA that this process has imported already, ``fwd`` is replaced. A function that someone took out of it
    before (``from flash_kda import fwd``) stays what it was.
    """
    global _theirs
    module = sys.modules.get("flash_kda")
    if _is_ours(module):
        return
    if module is None:
        module = ModuleType("flash_kda", "FlashKDA's interface on the kernels of flashkda_ops.")
        module.__spec__ = ModuleSpec("flash_kda", None, origin=__name__)  # what importlib.util.find_spec returns
        sys.modules["flash_kda"] = module
    else:
        _theirs = module.fwd
    module.fwd = fwd  # type: ignore[attr-defined]


def uninstall() -> None:
    """Undo :func:`install`: the next import finds FlashKDA itself, or nothing."""
    global _theirs
    module = sys.modules.get("flash_kda")
    if not _is_ours(module):
        return
    if _theirs is None:
        del sys.modules["flash_kda"]
    else:
        module.fwd, _theirs = _theirs, None  # type: ignore[union-attr]
