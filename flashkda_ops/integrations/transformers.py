"""The KDA functions of transformers' Kimi Linear, GLM-5 Next and Bailing hybrid models, served by flashkda_ops.

::

    from flashkda_ops.integrations import transformers as kda

    kda.enable()

The modeling files of transformers look up two functions of their module, ``chunk_kimi_delta_attention`` and
``recurrent_kimi_delta_attention``, at every call. :func:`enable` puts ours in their place. So a model may be created
before or after, and what ``torch.compile`` made of one is guarded on the functions and is compiled again. A call that
we decline goes to the function that was there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashkda_ops import functional
from flashkda_ops.validation import INDEX_DTYPES, TOKEN_DTYPES, state_dtype

__all__ = ["disable", "enable"]

_MODELS = ("kimi_linear", "glm5_next", "bailing_hybrid")
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
_replaced: dict[tuple[str, str], tuple[_Function, _Function]] = {}  # by module and name: theirs, ours


def enable() -> None:
    """Serve KDA in every model of transformers that has it, those that exist already included. Twice is once.

    Raises:
        ImportError: transformers is not installed, or this release of it has none of the models.
    """
    modules = []
    for model in _MODELS:
        name = f"transformers.models.{model}.modeling_{model}"
        if _exists(name):
            modules.append(importlib.import_module(name))
    served: dict[str, Callable[..., Any]] = {_CHUNK: functional.chunk_kda, _RECURRENT: functional.recurrent_kda}
    found = [(m, name) for m in modules for name in served if hasattr(m, name)]
    if not found:
        raise ImportError(f"flashkda_ops serves the models {', '.join(_MODELS)} of transformers: none is installed")
    for module, name in found:
        key = (module.__name__, name)
        if key not in _replaced:
            theirs = getattr(module, name)
            _replaced[key] = theirs, _serve(served[name], theirs)
            setattr(module, name, _replaced[key][1])


def disable() -> None:
    """Put the functions of transformers back, where nobody has replaced ours since."""
    while _replaced:
        (path, name), (theirs, ours) = _replaced.popitem()
        module = importlib.import_module(path)
        if getattr(module, name) is ours:
            setattr(module, name, theirs)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is not there
        return False


def _serve(ours: Callable[..., Any], theirs: _Function) -> _Function:
    @functools.wraps(theirs)
    def served(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **kwargs: Any) -> _Result:
        reason = _reason(query, key, value, g, beta, kwargs)
        if reason is not None:
            if not torch.compiler.is_compiling():
                _log_once(reason)
            return theirs(query, key, value, g=g, beta=beta, **kwargs)
        state, cu_seqlens = kwargs.get("initial_state"), _cu_seqlens(kwargs)
        function = ours
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (query, key, value, g, beta, state)
        ):
            function = functional.chunk_kda
        # States are V first in memory, as the decode kernel wants them, and K first to transformers, whose caches keep
        # the strides of the first state they are given: no step of a decode loop transposes.
        o, final_state = function(
            query, key, value, g, beta, initial_state=None if state is None else state.transpose(-1, -2),
            output_final_state=kwargs.get("output_final_state", False), state_v_first=True,
            use_qk_l2norm_in_kernel=kwargs.get("use_qk_l2norm_in_kernel", False), cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return o, None if final_state is None else final_state.transpose(-1, -2)

    return served


def _cu_seqlens(kwargs: dict[str, Any]) -> Tensor | None:
    """The bounds of packed sequences, by fla's name or by the one that transformers' collator has for attention."""
    cu_seqlens = kwargs.get("cu_seqlens")
    return kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens


def _reason(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, kwargs: dict[str, Any]) -> str | None:
    """Why this call is left to transformers, or None. Reads dtypes and keywords: cheap, and fit for tracing."""
    for name in _UNSERVED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            return f"{name} is given"
    if q.dtype not in TOKEN_DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
    for name, x in (("g", g), ("beta", beta)):
        if x.dtype != q.dtype and (x.dtype != torch.float32 or q.dtype == torch.float64):
            return f"{name} is {x.dtype} beside {q.dtype}"
    state = kwargs.get("initial_state")
    if state is not None and state.dtype != state_dtype(q):
        return f"initial_state is {state.dtype} beside {q.dtype}"
    cu_seqlens = _cu_seqlens(kwargs)
    if cu_seqlens is None:
        return None if kwargs.get("seq_idx") is None else "seq_idx is given without cu_seqlens"
    if cu_seqlens.dtype not in INDEX_DTYPES or q.shape[0] != 1:
        return f"cu_seqlens is {cu_seqlens.dtype}, with a batch of {q.shape[0]}"
    return None


@functools.cache
def _log_once(reason: str) -> None:
    _logger.warning("KDA of transformers runs on its own path: %s", reason)
