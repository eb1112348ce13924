"""The gated MLP of fla's models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``, the product in fp32 as in fla.

    Args:
        hidden_size: size of the input and the output.
        hidden_ratio: without ``intermediate_size``, it is ``2 / 3 * hidden_ratio * hidden_size`` rounded up to a
            multiple of 256; 4 by default.
        intermediate_size: size in between.
    """

    hidden_act = "swish"

    def __init__(self, hidden_size: int, hidden_ratio: int | None = None, intermediate_size: int | None = None) -> None:
        super().__init__()
        if intermediate_size is None:
            size = int(hidden_size * (4 if hidden_ratio is None else hidden_ratio) * 2 / 3)
            intermediate_size = (size + 255) // 256 * 256
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        """``[..., hidden_size]`` to the same; keywords of fla's callers are ignored."""
        gate, y = self.gate_proj(x), self.up_proj(x)
        wide = torch.promote_types(gate.dtype, torch.float32)
        return self.down_proj((F.silu(gate.to(wide)) * y.to(wide)).to(gate.dtype))
