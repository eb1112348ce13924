"""Root mean square norms, computed in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RMSNorm", "RMSNormGated"]


def _rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _validate(hidden_size: int, **inputs: Tensor | None) -> None:
    """Sizes that a product or a sum would broadcast silently."""
    shape = None
    for name, x in inputs.items():
        if x is None:
            continue
        if shape is None and (x.dim() == 0 or x.shape[-1] != hidden_size):
            raise ValueError(f"{name} must have shape [..., {hidden_size}], got {list(x.shape)}")
        if shape is not None and x.shape != shape:
            raise ValueError(f"{name} must have the shape of x, {list(shape)}, got {list(x.shape)}")
        shape = x.shape


class RMSNorm(nn.Module):
    """The RMS norm of fla, with its fused residual connection.

    Args:
        hidden_size: size of the last dimension.
        elementwise_affine: multiply by ``weight``.
        bias: add ``bias``.
        eps: added to the mean square.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.elementwise_affine = elementwise_affine
        self.eps = eps
        weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        has_bias = elementwise_affine and bias
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)) if has_bias else None
        )

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x + residual``; with ``prenorm`` also that sum, in the dtype of ``residual``.

        Raises:
            ValueError: naming the argument whose shape is not ``[..., hidden_size]``, or not that of ``x``.
        """
        _validate(self.hidden_size, x=x, residual=residual)
        total = _wide(x)
        stored = torch.float32 if residual_in_fp32 else x.dtype
        if residual is not None:
            total, stored = total + residual, residual.dtype
        y = _rms_norm(total, self.weight, self.bias, self.eps).to(x.dtype)
        return (y, total.to(stored)) if prenorm else y


class RMSNormGated(nn.Module):
    """The gated RMS norm of fla (``FusedRMSNormGated``): ``norm(x) * act(g)``.

    Args:
        hidden_size: size of the last dimension.
        elementwise_affine: multiply by ``weight``.
        eps: added to the mean square.
        activation: of the gate: ``"swish"`` (``"silu"``) or ``"sigmoid"``.
    """

    weight: nn.Parameter | None
    bias: None

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("swish", "silu", "sigmoid"):
            raise ValueError(f"activation must be swish, silu or sigmoid, got {activation}")
        self.hidden_size = hidden_size
        self.elementwise_affine = elementwise_affine
        self.eps = eps
        self.activation = activation
        weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The gated norm of ``x + residual``; with ``prenorm`` also that sum, in the dtype of ``residual``.

        Raises:
            ValueError: naming the argument whose shape is not ``[..., hidden_size]``, or not that of ``x``.
        """
        _validate(self.hidden_size, x=x, g=g, residual=residual)
        total = _wide(x)
        stored = torch.float32 if residual_in_fp32 else x.dtype
        if residual is not None:
            total, stored = total + residual, residual.dtype
        gate = _wide(g).sigmoid() if self.activation == "sigmoid" else nn.functional.silu(_wide(g))
        y = (_rms_norm(total, self.weight, self.bias, self.eps) * gate).to(x.dtype)
        return (y, total.to(stored)) if prenorm else y
