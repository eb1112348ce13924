"""What the compiler sees: one node a direction, no break, the results of eager."""

from __future__ import annotations

import copy
import textwrap
from typing import Any

import pytest
import torch
from expecttest import TestCase
from layers import Decoder, Layer, kda_nodes
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.fx import GraphModule

# AotEagerAndRecordGraphs returns functions that do not take boxed arguments.
pytestmark = pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")


def code(graph: GraphModule) -> str:
    """The code of a graph without the marks of last uses, wrapped."""
    lines = (line.split(";  ")[0].replace("torch.ops.", "") for line in graph.code.strip().splitlines())
    return "\n".join(textwrap.fill(line, 112, subsequent_indent=" " * 8) for line in lines if line.strip())


class GraphTest(TestCase):
    maxDiff = None

    def test_inference_is_one_node(self) -> None:
        backend = AotEagerAndRecordGraphs()
        layer = Layer().requires_grad_(False)
        torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(2, 5, 12))
        (graph,) = backend.fw_graphs
        assert kda_nodes(graph) == {"chunk_kda": 1}
        self.assertExpectedInline(
            code(graph),
            """\
def forward(self, arg0_1, arg1_1, arg2_1, arg3_1, arg4_1):
    view = aten.view.default(arg1_1, [10, 12])
    mm = aten.mm.default(view, arg0_1)
    _unsafe_view = aten._unsafe_view.default(mm, [2, 5, 34])
    split_with_sizes = aten.split_with_sizes.default(_unsafe_view, [8, 8, 8, 8, 2], -1)
    getitem = split_with_sizes[0]
    getitem_1 = split_with_sizes[1]
    getitem_2 = split_with_sizes[2]
    getitem_3 = split_with_sizes[3]
    getitem_4 = split_with_sizes[4]
    view_1 = aten.view.default(getitem, [2, 5, 2, 4])
    view_2 = aten.view.default(getitem_1, [2, 5, 2, 4])
    view_3 = aten.view.default(getitem_2, [2, 5, 2, 4])
    view_4 = aten.view.default(getitem_3, [2, 5, 2, 4])
    chunk_kda = flashkda.chunk_kda.default(view_1, view_2, view_3, view_4, getitem_4, arg2_1, arg3_1, None,
        None, None, False, True, True, True, False, -5.0)
    getitem_5 = chunk_kda[0]
    view_5 = aten.view.default(getitem_5, [2, 5, 8])
    view_6 = aten.view.default(view_5, [10, 8])
    mm_1 = aten.mm.default(view_6, arg4_1)
    _unsafe_view_1 = aten._unsafe_view.default(mm_1, [2, 5, 12])
    return (_unsafe_view_1,)""",
        )

    def test_training_is_one_node_forward_and_one_backward(self) -> None:
        backend = AotEagerAndRecordGraphs()
        torch.compile(Layer(), fullgraph=True, backend=backend)(torch.randn(2, 5, 12)).sum().backward()
        (forward,), (backward,) = backend.fw_graphs, backend.bw_graphs
        assert kda_nodes(forward) == {"chunk_kda": 1}
        assert kda_nodes(backward) == {"chunk_kda_backward": 1}
        self.assertExpectedInline(
            code(forward),
            """\
def forward(self, primals_1, primals_2, primals_3, primals_4, primals_5):
    view = aten.view.default(primals_2, [10, 12])
    mm = aten.mm.default(view, primals_1)
    _unsafe_view = aten._unsafe_view.default(mm, [2, 5, 34])
    split_with_sizes = aten.split_with_sizes.default(_unsafe_view, [8, 8, 8, 8, 2], -1)
    getitem = split_with_sizes[0]
    getitem_1 = split_with_sizes[1]
    getitem_2 = split_with_sizes[2]
    getitem_3 = split_with_sizes[3]
    getitem_4 = split_with_sizes[4]
    view_1 = aten.view.default(getitem, [2, 5, 2, 4])
    view_2 = aten.view.default(getitem_1, [2, 5, 2, 4])
    view_3 = aten.view.default(getitem_2, [2, 5, 2, 4])
    view_4 = aten.view.default(getitem_3, [2, 5, 2, 4])
    chunk_kda = flashkda.chunk_kda.default(view_1, view_2, view_3, view_4, getitem_4, primals_3, primals_4,
        None, None, None, False, True, True, True, False, -5.0)
    getitem_5 = chunk_kda[0]
    view_5 = aten.view.default(getitem_5, [2, 5, 8])
    view_6 = aten.view.default(view_5, [10, 8])
    mm_1 = aten.mm.default(view_6, primals_5)
    _unsafe_view_1 = aten._unsafe_view.default(mm_1, [2, 5, 12])
    t = aten.t.default(view_6)
    t_2 = aten.t.default(view)
    return (_unsafe_view_1, primals_3, primals_4, primals_5, getitem_4, view_1, view_2, view_3, view_4, t, t_2)""",
        )
        self.assertExpectedInline(
            code(backward),
            """\
def forward(self, primals_3, primals_4, primals_5, getitem_4, view_1, view_2, view_3, view_4, t, t_2,
        tangents_1):
    view_7 = aten.view.default(tangents_1, [10, 12])
    mm_2 = aten.mm.default(t, view_7)
    t_1 = aten.t.default(primals_5)
    mm_3 = aten.mm.default(view_7, t_1)
    view_8 = aten.view.default(mm_3, [2, 5, 8])
    view_9 = aten.view.default(view_8, [2, 5, 2, 4])
    chunk_kda_backward = flashkda.chunk_kda_backward.default(view_9, None, view_1, view_2, view_3, view_4,
        getitem_4, primals_3, primals_4, None, None, None, True, True, True, False, -5.0, False, False, [True,
        True, True, True, True, True, True, False])
    getitem_8 = chunk_kda_backward[0]
    getitem_9 = chunk_kda_backward[1]
    getitem_10 = chunk_kda_backward[2]
    getitem_11 = chunk_kda_backward[3]
    getitem_12 = chunk_kda_backward[4]
    getitem_13 = chunk_kda_backward[5]
    getitem_14 = chunk_kda_backward[6]
    view_10 = aten.view.default(getitem_11, [2, 5, 8])
    view_11 = aten.view.default(getitem_10, [2, 5, 8])
    view_12 = aten.view.default(getitem_9, [2, 5, 8])
    view_13 = aten.view.default(getitem_8, [2, 5, 8])
    cat = aten.cat.default([view_13, view_12, view_11, view_10, getitem_12], 2)
    view_14 = aten.view.default(cat, [10, 34])
    mm_4 = aten.mm.default(t_2, view_14)
    return (mm_4, None, getitem_13, getitem_14, mm_2)""",
        )


INPUTS: dict[str, tuple[Any, ...]] = {
    "dense": (torch.randn(3, 70, 12),),
    "packed": (torch.randn(1, 70, 12), torch.tensor([0, 3, 3, 60])),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", INPUTS)
def test_compiled_training_has_the_results_of_eager(layout: str, backend: str) -> None:
    eager = Layer()
    compiled = copy.deepcopy(eager)
    expected = eager(*INPUTS[layout])
    actual = torch.compile(compiled, fullgraph=True, backend=backend)(*INPUTS[layout])
    assert torch.equal(actual, expected)
    for o in (actual, expected):
        o.square().sum().backward()
    for a, e in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


@pytest.mark.parametrize("layout", INPUTS)
def test_compiled_inference_has_the_results_of_eager(layout: str) -> None:
    layer = Layer().requires_grad_(False)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(*INPUTS[layout]), layer(*INPUTS[layout]))


def test_compiled_decoding_updates_the_buffer_as_eager_does() -> None:
    eager = Decoder().requires_grad_(False)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for slots in ([5, 0, 2], [5, -1, 2], [1, 3, 5]):
        x, indices = torch.randn(3, 1, 12), torch.tensor(slots)
        assert torch.equal(step(x, indices), eager(x, indices))
        assert torch.equal(compiled.state_pool, eager.state_pool)
    assert eager.state_pool[5].any()


def test_decoding_is_one_node_that_mutates_the_buffer() -> None:
    backend = AotEagerAndRecordGraphs()
    decoder = Decoder().requires_grad_(False)
    torch.compile(decoder, fullgraph=True, backend=backend)(torch.randn(3, 1, 12), torch.tensor([5, 0, 2]))
    (graph,) = backend.graphs
    assert kda_nodes(graph) == {"recurrent_kda_paged": 1}
    assert decoder.state_pool[5].any()


def test_gradients_not_asked_for_are_not_in_the_graph() -> None:
    backend = AotEagerAndRecordGraphs()
    layer = Layer()
    layer.A_log.requires_grad_(False)
    torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(2, 5, 12)).sum().backward()
    (node,) = (n for n in backend.bw_graphs[0].graph.nodes if "flashkda" in str(n.target))
    assert node.args[-1] == [True, True, True, True, True, False, True, False]
