"""The layer and its caches under the compiler: one graph, one compilation for all masks, lengths and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import kda_nodes
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

from flashkda_ops.nn import KimiDeltaAttention, LinearCrossEntropyLoss, StaticCache

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


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3])
def test_a_batch_of_another_size_than_the_caches_is_refused_by_the_trace(length: int) -> None:
    layer = make_layer().eval()
    message = "past_key_values must hold as many states as the batch has sequences, got a batch of 4 and a cache of 2"
    for options, errors in (({"fullgraph": True}, torch._dynamo.exc.Unsupported), ({}, ValueError)):
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager", **options)
        cache = StaticCache(layer, 2)
        compiled(tokens(2, length), past_key_values=cache, use_cache=True)
        with pytest.raises(errors, match=message):
            compiled(tokens(4, length), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask must have shape"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask must have shape"),
        ({"cu_seqlens": [0, 2, 4]}, "cu_seqlens must be a tensor"),
    ],
    ids=range(3),
)
def test_inputs_that_do_not_fit_are_named_by_the_trace(call: dict[str, Any], message: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(make_layer(), fullgraph=True, backend="eager")(tokens(2, 4), **call)


LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "smoothing": {"label_smoothing": 0.1},
    "scale and cap": {"logit_scale": 1.5, "logit_softcapping": 3.0},
    "l2 warp": {"use_l2warp": True},
    "sum": {"reduction": "sum", "ignore_index": 0},
}


@pytest.mark.parametrize(
    ("options", "backend"),
    [*((options, "aot_eager") for options in LOSSES.values()), ({"logit_softcapping": 3.0}, "inductor")],
    ids=[*LOSSES, "inductor"],
)
@pytest.mark.parametrize("has_weight", [True, False])
def test_the_loss_compiles_to_one_graph_which_makes_the_rows_nan_that_eager_calls_do(
    options: dict[str, Any], has_weight: bool, backend: str
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    loss, x, weight = LinearCrossEntropyLoss(**options), torch.randn(6, 5 if has_weight else 11), torch.randn(11, 5)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for labels in ([1, 2, -100, 4, 0, 3], [1, -1, -100, 11, 0, 2**40]):
        results = []
        for function in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in ((x, weight) if has_weight else (x,))]
            value = function(leaves[0], torch.tensor(labels), *leaves[1:])
            value.backward()
            results.append([value.detach(), *(t.grad for t in leaves)])
        assert results[0][0].isnan() == (11 in labels or loss.ignore_index == 0)
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert counter.frame_count == 1


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (0, 1)], ids=str)
def test_the_compiled_loss_computes_the_gradients_that_are_asked_for(wanted: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    backend = AotEagerAndRecordGraphs()
    leaves = [torch.randn(6, 5), torch.randn(11, 5)]
    for i in wanted:
        leaves[i].requires_grad_()
    compiled = torch.compile(LinearCrossEntropyLoss(num_chunks=1), fullgraph=True, backend=backend)
    for grad in (True, False):
        backend.fw_graphs.clear()
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            loss = compiled(leaves[0], torch.arange(6), leaves[1])
        assert loss.requires_grad == (grad and bool(wanted))
        (graph,) = backend.fw_graphs
        products = [node for node in graph.graph.nodes if str(node.target) in ("aten.mm.default", "aten.addmm.default")]
        assert len(products) == 1 + (len(wanted) if grad else 0)


def test_a_prompt_of_any_length_compiles_twice_at_most() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for T in (7, 5, 11, 6):
        torch.testing.assert_close(compiled(tokens(2, T))[0], layer(tokens(2, T))[0])
    assert counter.frame_count <= 2
