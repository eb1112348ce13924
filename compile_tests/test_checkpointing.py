"""Activation checkpointing: the op is recomputed, or kept where a policy names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from layers import Layer
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flashkda_ops.ops import chunk_kda

pytestmark = pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")


def keep_kda(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.flashkda.chunk_kda.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES: dict[str, tuple[dict[str, Any], int]] = {  # options of checkpoint, and how often the op then runs
    "everything is recomputed": ({}, 2),
    "the op is kept": ({"context_fn": partial(create_selective_checkpoint_contexts, keep_kda)}, 1),
}


def gradients(layer: Layer, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    return list(torch.autograd.grad(run(x).square().sum(), list(layer.parameters())))


@pytest.mark.parametrize("policy", POLICIES)
def test_eagerly(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, runs = Layer(), []
    expected = gradients(layer, layer)
    run = chunk_kda.run
    monkeypatch.setattr(chunk_kda, "run", lambda *a: (runs.append(1), run(*a))[1])
    options, expected_runs = POLICIES[policy]
    actual = gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=False, **options))
    assert len(runs) == expected_runs
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled(policy: str) -> None:
    layer, ops = Layer(), []
    expected = gradients(layer, layer)
    options, expected_runs = POLICIES[policy]

    def record(graph: GraphModule, inputs: Any) -> GraphModule:
        ops.extend(str(node.target) for node in graph.graph.nodes if "flashkda" in str(node.target))
        return graph

    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False, **options), fullgraph=True, backend=backend
    )
    actual = gradients(layer, compiled)
    assert sorted(ops) == ["flashkda.chunk_kda.default"] * expected_runs + ["flashkda.chunk_kda_backward.default"]
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)
