"""Whole models of transformers as one graph, in inference, in training and while they generate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_models import KDA_FUNCTIONS, make_model, modeling, prompts
from layers import kda_nodes
from torch._dynamo.testing import AotEagerAndRecordGraphs
from transformers import CompileConfig

from flashkda_ops.integrations import transformers as integration

pytestmark = pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")


@pytest.fixture(autouse=True)
def afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    integration.disable()


def test_a_model_trains_as_one_graph() -> None:
    integration.enable()
    model, backend = make_model("kimi_linear"), AotEagerAndRecordGraphs()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    inputs = {"input_ids": prompts(2, 40), "attention_mask": mask, "labels": prompts(2, 40), "use_cache": False}
    expected = model(**inputs)
    gradient = torch.autograd.grad(expected.loss, model.model.embed_tokens.weight)
    actual = torch.compile(model, fullgraph=True, backend=backend)(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(torch.autograd.grad(actual.loss, model.model.embed_tokens.weight), gradient)
    assert kda_nodes(*backend.fw_graphs) == {"chunk_kda": 2}
    assert kda_nodes(*backend.bw_graphs) == {"chunk_kda_backward": 2}


@pytest.mark.parametrize("name", ["kimi_linear", "glm5_next"])
def test_generate_compiles_its_decode_step_with_a_static_cache(name: str) -> None:
    model, tokens = make_model(name), prompts(2, 20)
    integration.enable()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(tokens, **options)
    backend = AotEagerAndRecordGraphs()
    compile_config = CompileConfig(fullgraph=True, mode=None)
    compile_config.backend = lambda graph, inputs: backend(graph, inputs)  # generate copies its configuration
    compile_config._compile_all_devices = True  # by default it compiles on a GPU alone
    actual = model.generate(tokens, **options, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(actual, expected)
    (graph,) = backend.fw_graphs
    assert kda_nodes(graph) == {"recurrent_kda_paged": 2}


def test_a_layer_that_was_compiled_before_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in KDA_FUNCTIONS:  # in place of a path that takes long to trace
        monkeypatch.setattr(modeling("kimi_linear"), function, lambda query, key, value, **_: (value, None))
    layer, backend = (
        make_model("kimi_linear").model.layers[0].self_attn.requires_grad_(False),
        AotEagerAndRecordGraphs(),
    )
    compiled, outputs = torch.compile(layer, fullgraph=True, backend=backend), []
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    for change in (lambda: None, integration.enable, integration.disable):
        change()
        outputs.append(compiled(x))
    assert [kda_nodes(graph)["chunk_kda"] for graph in backend.fw_graphs] == [0, 1]
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_the_functions_of_fla_break_the_graph() -> None:
    """What the integration is for: when this fails, fla has learnt to be traced, and the docs are out of date."""
    pytest.importorskip("fla.ops.kda")
    compiled = torch.compile(make_model("kimi_linear"), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        compiled(prompts(2, 10), use_cache=False)
