"""flash-linear-attention 0.6.0 on the ops of this package.

::

    from flashkda_ops.integrations import fla

    fla.enable()              # calls of fla.ops.kda run here, through fla's own registry of backends
    fla.enable(compile=True)  # and fla's KDA models compile with fullgraph=True

In the registry the backend is ``flashkda_ops``, ahead of FlashKDA and of fla's Triton kernels. ``FLA_FLASHKDA_OPS=0``
in the environment switches it off. What it cannot serve, fla serves as before; its log (``fla.backends``, level
``INFO``) has the reason.

fla's registry stops a trace. So with ``compile=True``, while ``torch.compile`` traces and only then, the modules of
fla's KDA models run the forward passes of :mod:`flashkda_ops.nn`. Eager calls run fla's.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import fla.backends
import torch
from fla.ops.kda import chunk_kda as fla_chunk_kda
from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd as fla_fused_recurrent_kda_fwd
from torch import Tensor

try:
    from fla.models.cache_utils import Cache
except ImportError:  # fla-core alone: it has no models
    Cache = object

from flashkda_ops import cuda, functional, nn
from flashkda_ops.nn.convert import FLA_CLASSES, fla_reason
from flashkda_ops.ops.chunk_kda import Arguments as ChunkArguments
from flashkda_ops.ops.recurrent_kda_paged import Arguments as RecurrentArguments
from flashkda_ops.validation import (
    state_dtype,
    validate_num_accepted_tokens,
    validate_pool,
    validate_slots_per_token,
    validate_state,
    validate_tokens,
)

__all__ = ["StaticCache", "disable", "enable"]

_Verdict = tuple[bool, str | None]

_logger = logging.getLogger(__name__)
_enabled = ExitStack()  # how to undo what is enabled
_backend_on = _compile_on = False


# ---------------------------------------------------------------------------------------------------------------------
# The backend
# ---------------------------------------------------------------------------------------------------------------------


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


_CHUNK = inspect.signature(functional.chunk_kda)
_RECURRENT = inspect.signature(fla_fused_recurrent_kda_fwd)


def _recurrent(*args: Any, **kwargs: Any) -> tuple[RecurrentArguments, dict[str, Any]]:
    """The arguments of our op, its pool None where the states start from zero; and fla's."""
    a = _arguments(_RECURRENT, args, kwargs)
    rows = a["ssm_state_indices"]
    if rows is None:
        sequences = a["q"].shape[0] if a["cu_seqlens"] is None else a["cu_seqlens"].shape[0] - 1
        rows = torch.arange(sequences, device=a["q"].device, dtype=torch.int32)
    fields = {name: a[name] for name in RecurrentArguments._fields if name in a}
    if not a["use_gate_in_kernel"]:
        fields |= {"A_log": None, "dt_bias": None, "lower_bound": None}
    return RecurrentArguments(**fields, state_pool=a["initial_state"], state_indices=rows), a


class _Backend(fla.backends.BaseBackend):  # type: ignore[misc]
    """What fla's registry asks of a backend. A verifier that raises declines; the reason is what it says.

    On the CPU every call is served. On a GPU those with a kernel are: fla's are faster than the portable path.
    """

    backend_type = "flashkda_ops"
    env_var = "FLA_FLASHKDA_OPS"
    priority = 2  # FlashKDA has 3, the default is 5

    def chunk_kda_verifier(self, *args: Any, **kwargs: Any) -> _Verdict:
        a = _arguments(_CHUNK, args, kwargs)
        if a["cp_context"] is not None:
            return False, "cp_context: another protocol than that of flashkda_ops.distributed"
        if a["return_intermediate_states"]:
            return False, "return_intermediate_states: fla's have another dtype and, with cu_seqlens, another number"
        if a["chunk_size"] not in (32, 64):
            return False, f"chunk_size must be 32 or 64, got {a['chunk_size']}"
        if a["use_gate_in_kernel"] and a["safe_gate"] and a["lower_bound"] is None:
            return False, "lower_bound must be given with safe_gate=True"
        if not a["use_gate_in_kernel"]:
            a |= {"A_log": None, "dt_bias": None, "lower_bound": None}
        if a["transpose_state_layout"] is not None:
            a["state_v_first"] = a["transpose_state_layout"]
        op = ChunkArguments(**{name: a[name] for name in ChunkArguments._fields if name in a})
        validate_state("initial_state", op.initial_state, op.q, validate_tokens(op), op.state_v_first)
        reason = None if op.q.device.type == "cpu" else cuda.chunk_kda_reason(*op[:9])
        return reason is None, reason

    def chunk_kda(self, *args: Any, **kwargs: Any) -> Any:
        return functional.chunk_kda(*args, **kwargs)

    def fused_recurrent_kda_fwd_verifier(self, *args: Any, **kwargs: Any) -> _Verdict:
        op, a = _recurrent(*args, **kwargs)
        if a["kwargs"]:
            return False, f"unknown keywords: {', '.join(a['kwargs'])}"
        sizes = validate_tokens(op)
        on_cpu = op.q.device.type == "cpu"
        if a["inplace_final_state"]:
            if op.state_pool is None:
                return False, "inplace_final_state requires initial_state"
            validate_pool(op.state_pool, op.state_indices, op.q, sizes, op.state_v_first, slots=2)
            validate_num_accepted_tokens(op.num_accepted_tokens, op.state_indices, op.q, sizes)
            validate_slots_per_token(op.state_indices, op.cu_seqlens, sizes)
            tokens = sizes.N if op.cu_seqlens is not None else 1  # where there is one a sequence
            if a["ssm_state_indices"] is not None and op.state_indices.dim() == 1 and tokens != sizes.T:
                return False, "ssm_state_indices: one slot a sequence is for one token a sequence"
        else:
            if a["ssm_state_indices"] is not None:
                return False, "ssm_state_indices: with inplace_final_state alone"
            validate_state("initial_state", op.state_pool, op.q, sizes, op.state_v_first)
            if op.state_pool is not None and not on_cpu:
                return False, "the kernel updates states in place, and inplace_final_state=False asks for a new one"
        if on_cpu:
            return True, None
        reason = cuda.recurrent_kda_paged_reason(*self._with_pool(op)[:6])
        return reason is None, reason

    def fused_recurrent_kda_fwd(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        op, a = _recurrent(*args, **kwargs)
        if not a["inplace_final_state"]:
            op = self._with_pool(op, copy=True)
        o = torch.ops.flashkda.recurrent_kda_paged.default(*op)
        keep = a["inplace_final_state"] or a["output_final_state"]
        return o if a["out"] is None else a["out"].copy_(o), op.state_pool if keep else None

    @staticmethod
    def _with_pool(op: RecurrentArguments, copy: bool = False) -> RecurrentArguments:
        if op.state_pool is not None:
            pool = op.state_pool.clone(memory_format=torch.contiguous_format) if copy else op.state_pool
        else:
            N, K, (HV, V) = op.state_indices.shape[0], op.q.shape[-1], op.v.shape[-2:]
            pool = op.q.new_zeros((N, HV, V, K) if op.state_v_first else (N, HV, K, V), dtype=state_dtype(op.q))
        return op._replace(state_pool=pool)


def _register() -> None:
    """Enter the backend for both functions. fla has no way to take one out again: that is done by hand."""
    if fla.backends._DISPATCH_DISABLED:
        _logger.warning("FLA_DISABLE_BACKEND_DISPATCH=1: fla asks no backend")
        return
    function_registry = fla.backends._function_registries[inspect.unwrap(fla_chunk_kda)]
    for entry_point, registry in (
        (fla_chunk_kda, function_registry),
        ("kda", fla.backends._operation_registries["kda"]),  # fused_recurrent_kda_fwd and others that stay fla's
    ):
        fla.backends.register(entry_point)(_Backend)
        _enabled.callback(_unregister, registry)


def _unregister(registry: Any) -> None:
    name = _Backend.backend_type
    registry._backends.pop(name, None)
    registry._logged = {entry for entry in registry._logged if name not in entry.split(":")}


# ---------------------------------------------------------------------------------------------------------------------
# What is traced
# ---------------------------------------------------------------------------------------------------------------------


def _while_tracing(traced: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """``traced`` where the compiler looks on, ``original`` in eager calls."""

    parameters = inspect.signature(traced).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    # Without fla's attributes: one of them is the mark of a function that is not to be traced.
    @functools.wraps(original, updated=())
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        reason = fla_reason(self)
        for name in kwargs:
            if not takes_any and name not in parameters:
                reason = f"{name} is not served"
        if reason is not None:
            torch._dynamo.graph_break(f"flashkda_ops: {reason}")
            return original(self, *args, **kwargs)
        return traced(self, *args, **kwargs)

    return forward


def _replace(owner: Any, name: str, value: Any) -> None:
    _enabled.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, value)


def _trace_models() -> None:
    pairs = [(getattr(importlib.import_module(module), name), ours) for (module, name), ours in FLA_CLASSES.items()]
    cache = importlib.import_module("fla.models.cache_utils").FLACache
    for theirs, ours in pairs:
        _replace(theirs, "forward", _while_tracing(ours.forward, theirs.forward))

    # Where a model asks for a cache and was given none.
    original = cache.from_legacy_cache.__func__

    def from_legacy_cache(cls: Any, past_key_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and past_key_values is None:
            return cls(*args, **kwargs)
        return original(cls, past_key_values, *args, **kwargs)

    _replace(cache, "from_legacy_cache", classmethod(from_legacy_cache))


class StaticCache(nn.StaticCache, Cache):  # type: ignore[misc]
    """:class:`flashkda_ops.nn.StaticCache` for the models of fla, which take a cache of their own class alone."""


def enable(compile: bool = False) -> None:
    """Serve fla's KDA by the ops of this package, in models that exist already too. Twice is once.

    Args:
        compile: also make fla's KDA models traceable: what ``torch.compile`` traces from now on.

    Raises:
        ImportError: with ``compile``, if the package flash-linear-attention is not installed (fla-core has no models).
    """
    global _backend_on, _compile_on
    if compile and not _compile_on:
        _trace_models()
        _compile_on = True
    if not _backend_on:
        _register()
        _backend_on = True


def disable() -> None:
    """Leave fla as it was found. Code that was compiled meanwhile is guarded, and is compiled again."""
    global _backend_on, _compile_on
    _enabled.close()
    _backend_on = _compile_on = False
