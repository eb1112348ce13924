"""fla's modules in a model, exchanged for the ones of this package."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from flashkda_ops.nn.kimi_delta_attention import KimiDeltaAttention
from flashkda_ops.nn.loss import LinearCrossEntropyLoss
from flashkda_ops.nn.mlp import GatedMLP
from flashkda_ops.nn.norm import RMSNorm, RMSNormGated
from flashkda_ops.nn.short_conv import ShortConvolution

__all__ = ["convert", "fla_reason", "FLA_CLASSES"]

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


def fla_reason(module: Any) -> str | None:
    """Why the class here does not do the work of this object of fla's class, or None if it does."""
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
    loss of its own gets one, ``model.criterion``. A module that this package cannot stand in for is left as it is; the
    log says which, and why.

    Args:
        model: any module that contains ``fla.layers.kda.KimiDeltaAttention``.

    Returns:
        ``model``.
    """
    for name, module in model.named_modules():
        replacement = FLA_CLASSES.get((type(module).__module__, type(module).__qualname__))
        if replacement is not None:
            reason = fla_reason(module)
            if reason is not None:
                logger.warning("%s stays fla's %s: %s", name or "the model", type(module).__name__, reason)
                continue
            # The state of a module is its __dict__, which has the same entries in both classes.
            module.__class__ = replacement
        elif type(module).__module__.startswith("fla.models.") and getattr(module, "criterion", module) is None:
            module.criterion = LinearCrossEntropyLoss(use_l2warp=getattr(module.config, "use_l2warp", False))
    return model
