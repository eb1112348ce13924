"""Small layers around the ops, for the compiler to trace, and what of the ops is in its graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from flashkda_ops import chunk_kda, recurrent_kda_paged


class Layer(nn.Module):
    """A KDA layer at its smallest: one fused projection, the op, one projection back."""

    options: ClassVar[dict[str, Any]] = {
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "lower_bound": -5.0,
    }

    def __init__(self, hidden: int = 12, heads: int = 2, head_dim: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.heads, self.head_dim = heads, head_dim
        self.sizes = [heads * head_dim] * 4 + [heads]
        self.in_proj = nn.Parameter(0.3 * torch.randn(hidden, sum(self.sizes), generator=generator))
        self.out_proj = nn.Parameter(0.3 * torch.randn(heads * head_dim, hidden, generator=generator))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads * head_dim))

    def project(self, x: Tensor) -> list[Tensor]:
        *qkvg, beta = (x @ self.in_proj).split(self.sizes, dim=-1)
        return [*(y.unflatten(-1, (self.heads, self.head_dim)) for y in qkvg), beta]

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        o, _ = chunk_kda(
            *self.project(x), A_log=self.A_log, dt_bias=self.dt_bias, cu_seqlens=cu_seqlens, **self.options
        )
        return o.flatten(2) @ self.out_proj


class Decoder(Layer):
    """Its decode step, with the states in a buffer."""

    state_pool: Tensor

    def __init__(self, rows: int = 9) -> None:
        super().__init__()
        self.register_buffer("state_pool", torch.zeros(rows, self.heads, self.head_dim, self.head_dim))

    def forward(self, x: Tensor, state_indices: Tensor) -> Tensor:  # type: ignore[override]
        o = recurrent_kda_paged(
            *self.project(x), self.state_pool, state_indices, A_log=self.A_log, dt_bias=self.dt_bias, **self.options
        )
        return o.flatten(2) @ self.out_proj


def kda_nodes(*graphs: GraphModule) -> Counter[str]:
    """How many nodes of each op are in the graphs."""
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    # A mutating op is the first argument of a node that makes it functional.
    ops = [op for node in nodes for op in (node.target, *node.args[:1]) if isinstance(op, torch._ops.OpOverload)]
    return Counter(op._opname for op in ops if op.namespace == "flashkda")
