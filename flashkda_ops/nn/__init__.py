"""Modules around the ops, in plain PyTorch: they compile to one graph and run on any device."""

from flashkda_ops.nn.cache import StaticCache
from flashkda_ops.nn.convert import convert
from flashkda_ops.nn.kimi_delta_attention import KimiDeltaAttention
from flashkda_ops.nn.loss import LinearCrossEntropyLoss
from flashkda_ops.nn.mlp import GatedMLP
from flashkda_ops.nn.norm import RMSNorm, RMSNormGated
from flashkda_ops.nn.short_conv import ShortConvolution

__all__ = [
    "KimiDeltaAttention",
    "convert",
    "StaticCache",
    "GatedMLP",
    "LinearCrossEntropyLoss",
    "RMSNorm",
    "RMSNormGated",
    "ShortConvolution",
]
