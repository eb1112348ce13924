"""Autocast, ``torch.func`` and derivatives that ops do not have, while the compiler traces; the op of FlashKDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DIFFERENTIABLE, Call, make_call, paged, requiring_grad
from layers import kda_nodes
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs

from flashkda_ops import chunk_kda, chunk_kda_paged, recurrent_kda, recurrent_kda_paged
from flashkda_ops.integrations import flash_kda

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's own, of dual tensors
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin"),
    pytest.mark.filterwarnings("ignore:Error detected in GeneratedBackwardFor"),  # the error that a test is about
]


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


FORWARD_MODE: dict[str, tuple[str, Callable[[Call], Tensor]]] = {
    "chunk_kda": ("chunk_kda", lambda call: chunk_kda(**call)[0]),
    "recurrent_kda": ("recurrent_kda_paged", lambda call: recurrent_kda(**call)[0]),
    "recurrent_kda_paged": (
        "recurrent_kda_paged",
        lambda call: recurrent_kda_paged(**paged(call, torch.zeros(3, 4, 16, 8), torch.tensor([2, 0]))),
    ),
    "chunk_kda_paged": (
        "chunk_kda_paged",
        lambda call: chunk_kda_paged(**paged(call, torch.zeros(3, 4, 16, 8), torch.tensor([2, 0]))),
    ),
    "torch.ops": ("chunk_kda", lambda call: torch.ops.flashkda.chunk_kda(**call)[0]),
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", FORWARD_MODE)
def test_a_compiled_jvp_is_an_error_in_our_words(name: str, fullgraph: bool) -> None:
    op, function = FORWARD_MODE[name]
    call = make_call(9, B=2)

    def tangent(q: Tensor, t: Tensor) -> Tensor:
        return torch.func.jvp(lambda q: function({**call, "q": q}), (q,), (t,))[1]

    compiled = torch.compile(tangent, fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(Exception, match=f"flashkda::{op} has no forward-mode derivative"):
        compiled(call["q"], torch.ones_like(call["q"]))


def test_a_compiled_gradient_of_torch_func_says_what_to_call() -> None:
    call = make_call(9, B=2)
    gradient = torch.func.grad(lambda q: chunk_kda(**{**call, "q": q})[0].sum())
    with pytest.raises(
        Exception, match=r"torch\.func cannot differentiate flashkda::chunk_kda as an op: call flashkda_"
    ):
        torch.compile(gradient, fullgraph=True, backend="aot_eager")(call["q"])


@pytest.mark.parametrize("name", ["q", "initial_state"])
@pytest.mark.parametrize("output_final_state", [False, True])
def test_a_compiled_gradient_of_decode_is_an_error_in_our_words(name: str, output_final_state: bool) -> None:
    call = make_call(3, B=2, initial_state=True)
    call[name].requires_grad_()

    def total(call: Call) -> Tensor:
        o, state = recurrent_kda(**call, output_final_state=output_final_state)
        return o.sum() if state is None else state.sum()

    with pytest.raises(Exception, match=r"recurrent_kda(_paged)? has no gradient"):
        torch.compile(total, fullgraph=True, backend="aot_eager")(call)
    with torch.no_grad():
        assert torch.equal(torch.compile(total, fullgraph=True, backend="aot_eager")(call), total(call))


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


def from_a_snapshot(call: Call) -> Tensor:
    """A state that the call updates in place, read from a copy of it."""
    state, out = call["initial_state"], torch.empty_like(call["v"])
    flash_kda.fwd(**{**call, "initial_state": state.clone()}, out=out, final_state=state)
    return out


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_state_is_read_before_it_is_written(backend: str) -> None:
    call = flash_kda_call({"B": 3})
    twin = {**call, "initial_state": call["initial_state"].clone()}
    assert torch.equal(torch.compile(from_a_snapshot, fullgraph=True, backend=backend)(call), from_a_snapshot(twin))
    assert torch.equal(call["initial_state"], twin["initial_state"])


_DROPPED = "pytorch#198031: Inductor drops the copy where one op reads it and writes the original"


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=_DROPPED)),
    ],
)
def test_the_compiler_keeps_a_copy_of_what_the_op_writes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []
    monkeypatch.setattr(flash_kda, "_run", lambda a: addresses.extend(x.data_ptr() for x in a[10:12]))
    torch.compile(from_a_snapshot, fullgraph=True, backend=backend)(flash_kda_call({"B": 3}))
    initial, final = addresses
    assert initial != final
