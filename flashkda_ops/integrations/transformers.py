"""The KDA functions of transformers' Kimi Linear, GLM-5 Next and Bailing hybrid models, served by flashkda_ops.

::

    from flashkda_ops.integrations import transformers as kda

    kda.enable()

The modeling files of transformers look up two functions of their module, ``chunk_kimi_delta_attention`` and
``recurrent_kimi_delta_attention``, at every call. :func:`enable` puts ours in their place. So a model may be created
before or after, and what ``torch.compile`` made of one is guarded on the functions and is compiled again. A call that
we decline goes to the function that was there. So does one that gives what this package does not know, a parameter of a
later release: :func:`enable` compares signatures, and reports differences in the log.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashkda_ops import functional
from flashkda_ops.integrations import _known
from flashkda_ops.integrations._replacements import Replacements
from flashkda_ops.integrations._signatures import Theirs
from flashkda_ops.validation import INDEX_DTYPES, TOKEN_DTYPES, state_dtype

__all__ = ["MODELS", "disable", "enable"]

MODELS = ("kimi_linear", "glm5_next", "bailing_hybrid")
_CHUNK, _RECURRENT = "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"
_Result = tuple[Tensor, Tensor | None]
_Function = Callable[..., _Result]

# Keywords of fla's function that change its result and that no model of transformers passes.
_UNSERVED = inspect.signature(functional.chunk_kda).parameters.keys() - {
    "q", "k", "v", "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens",
    "cu_seqlens_cpu", "use_graph", "max_num_seqs", "disable_recompute", "safe_gate", "chunk_size", "batch_invariant",
    "validate",
}  # fmt: skip

_logger = logging.getLogger(__name__)
_replaced = Replacements(_logger)


def enable() -> None:
    """Serve KDA in every model of transformers that has it, those that exist already included. Twice is once.

    A function that has a new parameter which every call has to give is left as it is, which the log reports.

    Raises:
        ImportError: transformers is not installed, or this release of it has none of the models.
    """
    modules = []
    for model in MODELS:
        name = f"transformers.models.{model}.modeling_{model}"
        if _exists(name):
            modules.append(importlib.import_module(name))
    served: dict[str, Callable[..., Any]] = {_CHUNK: functional.chunk_kda, _RECURRENT: functional.recurrent_kda}
    found = [(m, name) for m in modules for name in served if hasattr(m, name)]
    if not found:
        raise ImportError(_reason_for_none())
    for module, name in found:
        _replaced.put(module, name, functools.partial(_serve, module, name, served[name]))
    _replaced.active = True


def disable() -> None:
    """Put the functions of transformers back.

    One that somebody has replaced since is left as it is, which the log reports; our function, if it is still called,
    hands its calls on to the one that was there before.
    """
    _replaced.undo()


def _reason_for_none() -> str:
    models = ", ".join(MODELS)
    if not _exists("transformers"):
        return f"transformers is not installed, whose models {models} flashkda_ops serves"
    version = getattr(importlib.import_module("transformers"), "__version__", "of unknown version")
    return f"transformers {version} has no model whose KDA flashkda_ops serves: it serves {models}, which 5.23.0 has"


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is not there
        return False


def _serve(module: ModuleType, name: str, ours: Callable[..., Any], theirs: _Function) -> _Function:
    """``ours`` in place of ``theirs``; or this one, where it cannot be replaced."""
    known = Theirs(theirs, _known.FUNCTIONS[name])
    if known.drift:
        _logger.warning(
            "%s.%s is not the function that flashkda_ops knows: %s. %s", module.__name__, name, known.drift,
            "It is left as it is" if known.drift.required else "Calls that give what is new are left to it",
        )  # fmt: skip
    if known.drift.required:
        return theirs

    @functools.wraps(theirs)
    def served(*args: Any, **kwargs: Any) -> _Result:
        if not _replaced.active:
            return theirs(*args, **kwargs)
        a = known.arguments(args, kwargs)
        reason = _reason(a, known)
        if reason is not None:
            if not torch.compiler.is_compiling():
                _log_once(reason)
            return theirs(*args, **kwargs)
        query, key, value, g, beta = (a[name] for name in ("query", "key", "value", "g", "beta"))
        state, cu_seqlens = a.get("initial_state"), _cu_seqlens(a)
        function = ours
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (query, key, value, g, beta, state)
        ):
            function = functional.chunk_kda
        # States are V first in memory, as the decode kernel wants them, and K first to transformers, whose caches keep
        # the strides of the first state they are given: no step of a decode loop transposes.
        o, final_state = function(
            query, key, value, g, beta, initial_state=None if state is None else state.transpose(-1, -2),
            output_final_state=a.get("output_final_state", False), state_v_first=True,
            use_qk_l2norm_in_kernel=a.get("use_qk_l2norm_in_kernel", False), cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return o, None if final_state is None else final_state.transpose(-1, -2)

    return served


def _cu_seqlens(kwargs: dict[str, Any]) -> Tensor | None:
    """The bounds of packed sequences, by fla's name or by the one that transformers' collator has for attention."""
    cu_seqlens = kwargs.get("cu_seqlens")
    return kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens


def _reason(kwargs: dict[str, Any], known: Theirs) -> str | None:
    """Why this call is left to transformers, or None. Reads dtypes and keywords: cheap, and fit for tracing."""
    missing = [name for name in ("query", "key", "value", "g", "beta") if name not in kwargs]
    if missing:
        return f"{missing[0]} is not given"
    unknown = known.unknown(kwargs)
    if unknown is not None:
        return f"{unknown} is given, which flashkda_ops does not know"
    for name in _UNSERVED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            return f"{name} is given"
    q, k, v, g, beta = (kwargs[name] for name in ("query", "key", "value", "g", "beta"))
    if q.dtype not in TOKEN_DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: they must share one of 16 to 64 bits"
    for name, x in (("g", g), ("beta", beta)):
        if x.dtype != q.dtype and (x.dtype != torch.float32 or q.dtype == torch.float64):
            return f"{name} is {x.dtype} beside q, k, v of {q.dtype}"
    state = kwargs.get("initial_state")
    if state is not None and state.dtype != state_dtype(q):
        return f"initial_state is {state.dtype} beside q, k, v of {q.dtype}, where it must be {state_dtype(q)}"
    cu_seqlens = _cu_seqlens(kwargs)
    if cu_seqlens is None:
        return None if kwargs.get("seq_idx") is None else "seq_idx is given without cu_seqlens"
    if cu_seqlens.dtype not in INDEX_DTYPES:
        return f"cu_seqlens is {cu_seqlens.dtype}, and must be torch.int32 or torch.int64"
    if q.shape[0] != 1:
        return f"cu_seqlens is given with a batch of {q.shape[0]}, which must be 1"
    return None


@functools.cache
def _log_once(reason: str) -> None:
    _logger.warning("KDA of transformers runs on its own function: %s", reason)
