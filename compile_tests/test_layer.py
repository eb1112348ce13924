"""The layer and its caches under the compiler: one graph, one compilation for all masks, lengths and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import kda_nodes
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

from flashkda_ops.nn import KimiDeltaAttention, StaticCache

pytestmark = pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")

HIDDEN = 24


def make_layer() -> KimiDeltaAttention:
    torch.manual_seed(0)
    return KimiDeltaAttention(HIDDEN, head_dim=8, num_heads=2, num_v_heads=4, layer_idx=0)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_training_is_one_graph_a_direction_with_one_node_of_ours() -> None:
    backend = AotEagerAndRecordGraphs()
    layer = make_layer()
    x = tokens(2, 7)
    layer(x)[0].square().sum().backward()
    expected = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend=backend)(x)[0].square().sum().backward()
    (forward,), (backward,) = backend.fw_graphs, backend.bw_graphs
    assert kda_nodes(forward) == {"chunk_kda": 1}
    assert kda_nodes(backward) == {"chunk_kda_backward": 1}
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def masks() -> list[Tensor]:
    return [(torch.rand(3, 6, generator=torch.Generator().manual_seed(n)) < 0.6).long() for n in range(4)]


@pytest.mark.parametrize(
    ("batch", "calls"),
    [
        (3, [{"attention_mask": mask} for mask in masks()]),
        (1, [{"cu_seqlens": torch.tensor(ends)} for ends in ([0, 2, 6], [0, 0, 4], [0, 5, 6])]),
    ],
    ids=["masks", "packed"],
)
def test_one_graph_serves_every_mask_and_every_packing(batch: int, calls: list[dict[str, Any]]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for call in calls:
        torch.testing.assert_close(compiled(tokens(batch, 6), **call)[0], layer(tokens(batch, 6), **call)[0])
    assert counter.frame_count == 1


@torch.no_grad()
def test_one_graph_serves_every_step_and_updates_the_cache_where_it_is() -> None:
    layer = make_layer().eval()
    counter = CompileCounterWithBackend("inductor")

    def step(x: Tensor, cache: StaticCache, mask: Tensor) -> Tensor:
        return layer(x, attention_mask=mask, past_key_values=cache, use_cache=True)[0]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    caches = [StaticCache(layer, 2), StaticCache(layer, 2)]
    addresses = [x.data_ptr() for x in caches[0]._tensors()]
    for t in range(5):
        x, mask = tokens(2, 5)[:, t : t + 1], torch.tensor([[1], [t % 2]])
        torch.testing.assert_close(compiled(x, caches[0], mask), step(x, caches[1], mask))
    assert counter.frame_count == 1
    assert [x.data_ptr() for x in caches[0]._tensors()] == addresses
    for actual, expected in zip(caches[0]._tensors(), caches[1]._tensors(), strict=True):
        torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_the_decode_step_is_one_node_that_mutates_the_state() -> None:
    layer = make_layer().eval()
    backend = AotEagerAndRecordGraphs()
    cache = StaticCache(layer, 2)
    torch.compile(layer, fullgraph=True, backend=backend)(tokens(2, 1), past_key_values=cache, use_cache=True)
    (graph,) = backend.fw_graphs
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("recurrent_kda_paged" in name or "auto_functionalized" in name for name in names) == 1


def test_a_prompt_of_any_length_compiles_twice_at_most() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for T in (7, 5, 11, 6):
        torch.testing.assert_close(compiled(tokens(2, T))[0], layer(tokens(2, T))[0])
    assert counter.frame_count <= 2
