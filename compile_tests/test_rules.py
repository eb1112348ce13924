"""Autocast and ``torch.func.vmap`` while the compiler traces, and the op of FlashKDA's interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DIFFERENTIABLE, Call, make_call, requiring_grad
from layers import kda_nodes
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs

from flashkda_ops import chunk_kda
from flashkda_ops.integrations import flash_kda

pytestmark = pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")


def test_autocast_is_traced_with_its_gradients() -> None:
    call, reference = (requiring_grad(make_call(20, B=2)) for _ in range(2))

    def loss(call: Call) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            o = chunk_kda(**call)[0]
        assert o.dtype == torch.bfloat16
        return o.float().square().sum()

    loss(reference).backward()
    backend = AotEagerAndRecordGraphs()
    torch.compile(loss, fullgraph=True, backend=backend)(call).backward()
    assert kda_nodes(*backend.fw_graphs) == {"chunk_kda": 1}
    assert kda_nodes(*backend.bw_graphs) == {"chunk_kda_backward": 1}
    for name in DIFFERENTIABLE:
        if name in call:
            assert torch.equal(call[name].grad, reference[name].grad), name


@pytest.mark.parametrize("packed", [False, True])
def test_a_mapped_call_is_one_op(packed: bool) -> None:
    call = make_call(9, **({"cu_seqlens": [0, 3, 7]} if packed else {"B": 2}))
    backend, samples = AotEagerAndRecordGraphs(), torch.randn(3, *call["q"].shape)
    mapped = torch.vmap(lambda q: chunk_kda(**{**call, "q": q})[0])
    actual = torch.compile(mapped, fullgraph=True, backend=backend)(samples)
    assert kda_nodes(*backend.fw_graphs, *backend.bw_graphs) == {"chunk_kda": 1}
    assert torch.equal(actual, mapped(samples))


def flash_kda_call(layout: dict[str, Any]) -> Call:
    call = make_call(5, H=2, HV=2, K=6, V=3, initial_state=True, state_v_first=True, **layout)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")
    return {name: call[name] for name in names if name in call} | {"scale": 0.5}


LAYOUTS: list[dict[str, Any]] = [{"B": 3}, {"cu_seqlens": [0, 2, 5]}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_flash_kda_is_traced_as_one_op(layout: dict[str, Any]) -> None:
    def function(call: Call) -> tuple[Tensor, Tensor]:
        out, final_state = torch.empty_like(call["v"]), torch.empty_like(call["initial_state"])
        flash_kda.fwd(**call, out=out, final_state=final_state)
        return out + 0, final_state

    call = flash_kda_call(layout)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(call), function(call), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_op_of_flash_kda_is_sound(layout: dict[str, Any]) -> None:
    call = flash_kda_call(layout)
    call |= {"out": torch.empty_like(call["v"]), "final_state": torch.empty_like(call["initial_state"])}
    torch.library.opcheck(torch.ops.flashkda.flash_kda_fwd.default, (), call)
