"""fla's modules in a model, exchanged for the ones of this package."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from flashkda_ops.integrations import _known, transformers
from flashkda_ops.integrations._signatures import Drift, drift, is_default
from flashkda_ops.nn.kimi_delta_attention import KimiDeltaAttention
from flashkda_ops.nn.loss import LinearCrossEntropyLoss
from flashkda_ops.nn.mlp import GatedMLP
from flashkda_ops.nn.norm import RMSNorm, RMSNormGated
from flashkda_ops.nn.short_conv import ShortConvolution

__all__ = ["convert", "fla_drift", "fla_reason", "FLA_CLASSES"]

logger = logging.getLogger(__name__)

FLA_CLASSES: dict[tuple[str, str], type[nn.Module]] = {
    ("fla.layers.kda", "KimiDeltaAttention"): KimiDeltaAttention,
    ("fla.modules.causal_conv1d.ops", "ShortConvolution"): ShortConvolution,
    ("fla.modules.norm.fused_norm_gate", "FusedRMSNormGated"): RMSNormGated,
    ("fla.modules.norm.layernorm", "RMSNorm"): RMSNorm,
    ("fla.modules.mlp", "GatedMLP"): GatedMLP,
    ("fla.modules.fused_linear_cross_entropy.ops", "FusedLinearCrossEntropyLoss"): LinearCrossEntropyLoss,
    ("fla.modules.fused_cross_entropy.ops", "FusedCrossEntropyLoss"): LinearCrossEntropyLoss,
}
"""Module and name of each of fla's classes (flash-linear-attention 0.6.0), and the class here that does its work: its
attributes have fla's names, so that its ``forward`` runs on an object of fla's class."""


_CAUSAL_LM = ("fla.models.kda.modeling_kda", "KDAForCausalLM")


class FlaDrift(NamedTuple):
    """How one of fla's classes differs from the one of 0.6.0.

    ``reason``: why the class here cannot do its work, or None. ``options``: the new ones, with their defaults.
    ``forward``: how that function differs. ``text``: all of it in words, empty where nothing differs.
    """

    reason: str | None
    options: Mapping[str, object]
    forward: Drift
    text: str


def fla_drift(theirs: type, forward: Callable[..., Any] | None = None) -> FlaDrift:
    """Compare one of ``FLA_CLASSES``, and its ``forward`` or the one given, with what is known."""
    known = _known.CLASSES[theirs.__name__]
    told = inspect.signature(theirs).parameters.values()
    options = {
        p.name: p.default
        for p in told
        if p.name not in known.options and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    required = [name for name, default in options.items() if default is inspect.Parameter.empty]
    new = [f"option {x} is new and required" for x in required]
    new += [f"option {x} is new, {default!r} by default" for x, default in options.items() if x not in required]
    of_forward = drift(theirs.forward if forward is None else forward, known.forward)  # type: ignore[attr-defined]
    text = "; ".join(new + ([f"forward: {of_forward}"] if of_forward else []))
    stays = required or of_forward.required or of_forward.changes
    return FlaDrift(text if stays else None, options, of_forward, text)


def fla_reason(module: Any, options: Mapping[str, object] = MappingProxyType({})) -> str | None:
    """Why the class here does not do the work of this object of fla's class, or None if it does.

    Args:
        options: of the class that are not known here, with their defaults.
    """
    for name, default in options.items():
        value = getattr(module, name, default)
        if not is_default(value, default):
            return f"{name} is {value}: an option that flashkda_ops does not know"
    lower_bound = getattr(module, "lower_bound", None)
    if lower_bound is not None and not -5 <= lower_bound < 0:
        return f"lower_bound is {lower_bound}: the op takes [-5, 0)"
    if getattr(module, "hidden_act", "swish") != "swish":
        return f"hidden_act is {module.hidden_act}: swish alone is here"
    for name in ("process_group", "lse_square_scale", "return_z_loss"):
        if getattr(module, name, None):
            return f"{name} is {getattr(module, name)}: the loss has no such option"
    return None


def convert(model: nn.Module) -> nn.Module:
    """Exchange fla's KDA layers, and the norms and MLPs around them, for those of this package, in place.

    The model then runs on any device, compiles to one graph, and its results are the same within rounding. Parameters,
    buffers, hooks and names stay: only the classes of the modules change. A causal language model of fla that has no
    loss of its own gets one, ``model.criterion``; and it takes its cache by the name ``cache`` too, which transformers
    has for it from 5.24 on. A module that this package cannot stand in for is left as it is; the log says which, and
    why. A model that has been converted stays as it is.

    Args:
        model: any module that contains ``fla.layers.kda.KimiDeltaAttention``, or another module that this package
            stands in for.

    Returns:
        ``model``.

    Raises:
        ValueError: the model contains nothing that can be exchanged. Models of transformers have layers of their own,
            which :mod:`flashkda_ops.integrations.transformers` serves.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found, reported = False, set()
    for name, module in model.named_modules():
        theirs = type(module)
        replacement = FLA_CLASSES.get((theirs.__module__, theirs.__qualname__))
        found = found or replacement is not None or theirs in FLA_CLASSES.values()
        if replacement is not None:
            differences = fla_drift(theirs)
            reason = differences.reason or fla_reason(module, differences.options)
            if reason is not None:
                logger.warning("%s stays fla's %s: %s", name or "the model", theirs.__name__, reason)
                continue
            if differences.text and theirs not in reported:
                reported.add(theirs)
                logger.warning("fla's %s is not the one that flashkda_ops knows: %s", theirs.__name__, differences.text)
            # The state of a module is its __dict__, which has the same entries in both classes.
            module.__class__ = replacement
        elif theirs.__module__.startswith("fla.models.") and getattr(module, "criterion", module) is None:
            module.criterion = LinearCrossEntropyLoss(use_l2warp=getattr(module.config, "use_l2warp", False))
        if (theirs.__module__, theirs.__qualname__) == _CAUSAL_LM:
            module.__class__ = importlib.import_module("flashkda_ops.integrations.fla").KDAForCausalLM
    if not found:
        raise ValueError(_nothing_found(model))
    return model


def _nothing_found(model: nn.Module) -> str:
    expected = "model must contain modules of fla, such as fla.layers.kda.KimiDeltaAttention"
    of_transformers = [f"transformers.models.{name}.modeling_{name}" for name in transformers.MODELS]
    for module in model.modules():
        theirs = type(module)
        if theirs.__module__ in of_transformers:
            return (
                f"{expected}, got {type(model).__name__} with layers of transformers: "
                "flashkda_ops.integrations.transformers.enable() serves their KDA"
            )
        for base in theirs.__mro__[1:]:
            if (base.__module__, base.__qualname__) in FLA_CLASSES:
                return f"{expected}, got {type(model).__name__} with a subclass of one, {theirs.__name__}, which stays"
    return f"{expected}, got {type(model).__name__} without any"
