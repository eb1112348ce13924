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

From 5.24.0 on, transformers hands a model its cache by the name ``cache``, which fla 0.6.0's drop: each step of
``generate`` would start from nothing. So the KDA models of fla learn that name here.

What is found of fla is compared with the signatures of 0.6.0, and differences are reported in the log.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import fla.backends
import torch
from fla.ops.kda import chunk_kda as fla_chunk_kda
from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd as fla_fused_recurrent_kda_fwd
from torch import Tensor

try:
    from fla.models.cache_utils import Cache
    from fla.models.kda.modeling_kda import KDAForCausalLM as _FlaKDAForCausalLM
except ImportError:  # fla-core alone: it has no models
    Cache = _FlaKDAForCausalLM = object

from flashkda_ops import cuda, functional, nn
from flashkda_ops.integrations import _known
from flashkda_ops.integrations._replacements import Replacements, name_of
from flashkda_ops.integrations._signatures import Theirs, drift
from flashkda_ops.nn.convert import FLA_CLASSES, fla_drift, fla_reason
from flashkda_ops.ops import plans
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

__all__ = ["KDAForCausalLM", "StaticCache", "disable", "enable"]

_Verdict = tuple[bool, str | None]

_logger = logging.getLogger(__name__)
_replaced = Replacements(_logger)


# ---------------------------------------------------------------------------------------------------------------------
# The backend
# ---------------------------------------------------------------------------------------------------------------------

_CHUNK = Theirs(fla_chunk_kda, _known.FUNCTIONS["fla.ops.kda.chunk_kda"], _known.CHUNK_KEYWORDS)
_RECURRENT = Theirs(
    fla_fused_recurrent_kda_fwd, _known.FUNCTIONS["fla.ops.kda.fused_recurrent.fused_recurrent_kda_fwd"]
)
_CHUNK_SIGNATURE = inspect.signature(functional.chunk_kda)


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _refuse_unknown(theirs: Theirs, arguments: Mapping[str, Any]) -> None:
    name = theirs.unknown(arguments)
    if name is not None:
        raise ValueError(f"{name} is given, which flashkda_ops does not know")


def _chunk(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of fla's function as one of ours, whose signature is that of fla 0.6.0."""
    if not _CHUNK.drift:
        return args, kwargs
    a = _CHUNK.arguments(args, kwargs)
    _refuse_unknown(_CHUNK, a)
    return (), {name: x for name, x in a.items() if name not in _CHUNK.drift.optional}


def _recurrent(*args: Any, **kwargs: Any) -> tuple[RecurrentArguments, dict[str, Any]]:
    """The arguments of our op, its pool None where the states start from zero; and fla's."""
    a = _RECURRENT.known_defaults | _arguments(_RECURRENT.signature, args, kwargs)
    _refuse_unknown(_RECURRENT, a)
    rows = a["ssm_state_indices"]
    if rows is None:
        sequences = a["q"].shape[0] if a["cu_seqlens"] is None else a["cu_seqlens"].shape[0] - 1
        rows = torch.arange(sequences, device=a["q"].device, dtype=torch.int32)
    fields = {name: a[name] for name in RecurrentArguments._fields if name in a}
    if not a["use_gate_in_kernel"]:
        fields |= {"A_log": None, "dt_bias": None, "lower_bound": None}
    return RecurrentArguments(**fields, state_pool=a["initial_state"], state_indices=rows), a


_DISABLED = "flashkda_ops.integrations.fla is disabled"


class _Backend(fla.backends.BaseBackend):  # type: ignore[misc]
    """What fla's registry asks of a backend. A verifier that raises declines; the reason is what it says.

    On the CPU every call is served. On a GPU those with a kernel are: fla's are faster than the portable path.
    """

    backend_type = "flashkda_ops"
    env_var = "FLA_FLASHKDA_OPS"
    priority = 2  # FlashKDA has 3, the default is 5

    def chunk_kda_verifier(self, *args: Any, **kwargs: Any) -> _Verdict:
        if not _replaced.active:
            return False, _DISABLED
        args, kwargs = _chunk(args, kwargs)
        a = _arguments(_CHUNK_SIGNATURE, args, kwargs)
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
        sizes = validate_tokens(op)
        validate_state("initial_state", op.initial_state, op.q, sizes, op.state_v_first)
        reason = None if op.q.device.type == "cpu" else plans.reason(op[:9], sizes)
        return reason is None, reason

    def chunk_kda(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _chunk(args, kwargs)
        return functional.chunk_kda(*args, **kwargs)

    def fused_recurrent_kda_fwd_verifier(self, *args: Any, **kwargs: Any) -> _Verdict:
        if not _replaced.active:
            return False, _DISABLED
        op, a = _recurrent(*args, **kwargs)
        if a.get("kwargs"):
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
                return False, "ssm_state_indices requires inplace_final_state"
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


_registered: list[tuple[Any, Any]] = []  # registries of fla's, and the backends that they have of ours


def _register() -> None:
    """Enter the backend for both functions. fla has no way to take one out again: that is done by hand."""
    try:
        if fla.backends._DISPATCH_DISABLED:
            _logger.warning("FLA_DISABLE_BACKEND_DISPATCH=1: fla asks no backend, and its functions stay its own")
            return
        of_chunk = fla.backends._function_registries[inspect.unwrap(fla_chunk_kda)]
        of_kda = fla.backends._operation_registries["kda"]
    except (AttributeError, KeyError) as error:
        raise ImportError(
            f"flashkda_ops knows the registry of backends of fla 0.6.0, which is not the one that is installed: {error}"
        ) from error
    for entry_point, registry, theirs in (
        (fla_chunk_kda, of_chunk, _CHUNK),
        ("kda", of_kda, _RECURRENT),  # of whose functions the backend has one, and the others stay fla's
    ):
        name = _Backend.backend_type
        if any(registry is r and registry._backends.get(name) is backend for r, backend in _registered):
            continue
        if theirs.drift:
            _report(name_of(inspect.unwrap(theirs.function)), str(theirs.drift), bool(theirs.drift.required))
        if theirs.drift.required:
            continue
        fla.backends.register(entry_point)(_Backend)
        _registered.append((registry, registry._backends[name]))


def _unregister() -> None:
    name = _Backend.backend_type
    while _registered:
        registry, backend = _registered.pop()
        current = registry._backends.get(name)
        if current is backend:
            del registry._backends[name]
            registry._logged = {entry for entry in registry._logged if name not in entry.split(":")}
        elif current is not None:
            _logger.warning("fla's backend %s is left as it is: %s has replaced ours", name, name_of(type(current)))


def _report(name: str, differences: str, stays: bool) -> None:
    rest = "It stays fla's" if stays else "Calls that give what is new run on fla's"
    _logger.warning("%s is not the one of fla 0.6.0 that flashkda_ops knows: %s. %s", name, differences, rest)


# ---------------------------------------------------------------------------------------------------------------------
# What is traced
# ---------------------------------------------------------------------------------------------------------------------


def _while_tracing(traced: Callable[..., Any], theirs: type, original: Callable[..., Any]) -> Callable[..., Any]:
    """``traced`` where the compiler looks on, ``original`` in eager calls; this one alone, if it cannot be replaced."""
    differences = fla_drift(theirs, original)
    if differences.text:
        _report(name_of(theirs), differences.text, differences.reason is not None)
    if differences.reason is not None:
        return original

    parameters = inspect.signature(traced).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unserved, options = frozenset(differences.forward.optional), differences.options
    most = len([p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]) - 1  # without self

    # Without fla's attributes: one of them is the mark of a function that is not to be traced.
    @functools.wraps(original, updated=())
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() or not _replaced.active:
            return original(self, *args, **kwargs)
        reason = fla_reason(self, options)
        if len(args) > most:
            reason = f"{len(args)} positional arguments are not served"
        for name in kwargs:
            if name in unserved or (not takes_any and name not in parameters):
                reason = f"{name} is not served"
        if reason is not None:
            torch._dynamo.graph_break(f"flashkda_ops: {reason}")
            return original(self, *args, **kwargs)
        return traced(self, *args, **kwargs)

    return forward


def _making_a_cache(found: Any) -> Any:
    """Where a model asks for a cache and was given none."""
    name = "fla.models.cache_utils.FLACache.from_legacy_cache"
    if not isinstance(found, (classmethod, MethodType)):  # what somebody has replaced it by
        _report(name, "it is no class method", True)
        return found
    original = found.__func__
    differences = drift(original, _known.FUNCTIONS[name])
    if differences:
        _report(name, str(differences), True)
        return found

    @functools.wraps(original, updated=())
    def from_legacy_cache(cls: Any, past_key_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and _replaced.active and past_key_values is None:
            return cls(*args, **kwargs)
        return original(cls, past_key_values, *args, **kwargs)

    return classmethod(from_legacy_cache)


def _trace_models() -> None:
    pairs = [(getattr(importlib.import_module(module), name), ours) for (module, name), ours in FLA_CLASSES.items()]
    cache = importlib.import_module("fla.models.cache_utils").FLACache
    for theirs, ours in pairs:
        _replaced.put(theirs, "forward", functools.partial(_while_tracing, ours.forward, theirs))
    _replaced.put(cache, "from_legacy_cache", _making_a_cache)


# ---------------------------------------------------------------------------------------------------------------------
# What a model calls its cache
# ---------------------------------------------------------------------------------------------------------------------


def _taking_cache(forward: Callable[..., Any], always: bool = False) -> Callable[..., Any]:
    """A model's forward, which takes its cache by both names; ``always``, or while this integration is enabled."""
    signature = inspect.signature(forward)
    if "cache" in signature.parameters:
        return forward

    @functools.wraps(forward, updated=())
    def taking_cache(self: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is None:
            return forward(self, *args, **kwargs)
        name = "past_key_values" if always or _replaced.active else "cache"
        return forward(self, *args, **kwargs, **{name: cache})

    # generate() looks for the names of what it hands over.
    parameters = [
        *signature.parameters.values(),
        inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None),
    ]
    parameters.sort(key=lambda p: p.kind)
    taking_cache.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return taking_cache


class KDAForCausalLM(_FlaKDAForCausalLM):  # type: ignore[misc]
    """fla's model, which also takes its cache by the name ``cache``, as transformers hands it over from 5.24.0 on.

    :func:`flashkda_ops.nn.convert` makes a model of fla one of these.
    """

    if _FlaKDAForCausalLM is not object:
        forward = _taking_cache(_FlaKDAForCausalLM.forward, always=True)


class StaticCache(nn.StaticCache, Cache):  # type: ignore[misc]
    """:class:`flashkda_ops.nn.StaticCache` for the models of fla, which take a cache of their own class alone."""


def enable(compile: bool = False) -> None:
    """Serve fla's KDA by the ops of this package, in models that exist already too. Twice is once.

    Args:
        compile: also make fla's KDA models traceable: what ``torch.compile`` traces from now on.

    Raises:
        ImportError: this fla has another registry of backends; or, with ``compile``, the package flash-linear-attention
            is not installed (fla-core has no models).
    """
    if compile and _FlaKDAForCausalLM is object:
        raise ImportError("compile=True requires fla.models, which is part of flash-linear-attention, not of fla-core")
    _register()
    if compile:
        _trace_models()
    if _FlaKDAForCausalLM is not object:
        _replaced.put(_FlaKDAForCausalLM, "forward", _taking_cache)
    _replaced.active = True


def disable() -> None:
    """Leave fla as it was found. Code that was compiled meanwhile is guarded, and is compiled again.

    What somebody has replaced since is left as it is, and the log reports it: a function of ours that is still called
    hands its calls on to fla's.
    """
    _replaced.undo()
    _unregister()
