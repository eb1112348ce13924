"""Gradients are those of autograd through the reference in fp64, from any cotangents, and only where asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BETAS, DIFFERENTIABLE, GATES, TOKENS, Call, error, make_call, reference, requiring_grad
from torch import Tensor

from flashkda_ops import chunk_kda, recurrent_kda, recurrent_kda_paged
from flashkda_ops.ops import chunk_kda_backward
from flashkda_ops.ops.eager import EagerChunkKDA

LAYOUTS: dict[str, dict[str, Any]] = {"dense": {"B": 2}, "packed": {"cu_seqlens": [0, 3, 3, 37]}}


def through_the_function(call: Call) -> tuple[Tensor, Tensor]:
    o, state = chunk_kda(**call, output_final_state=True)
    return o, state


def through_the_op(call: Call) -> tuple[Tensor, Tensor]:
    return torch.ops.flashkda.chunk_kda(**call, output_final_state=True)[:2]


def gradients(
    function: Callable[[Call], tuple[Tensor, Tensor]],
    call: Call,
    names: tuple[str, ...] = DIFFERENTIABLE,
    cotangents: tuple[bool, bool] = (True, True),
) -> dict[str, Tensor | None]:
    """Gradients of the named arguments from random cotangents of the output, the final state, or both."""
    call = requiring_grad(call, names)
    generator = torch.Generator().manual_seed(7)
    outputs, given = [], []
    for x, wanted in zip(function(call), cotangents, strict=True):
        cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if wanted:
            outputs.append(x)
            given.append(cotangent.to(x.dtype))
    torch.autograd.backward(outputs, given)
    return {name: call[name].grad for name in DIFFERENTIABLE if call.get(name) is not None}


def assert_close(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        wanted = expected[name]
        wanted = torch.zeros_like(x) if wanted is None else wanted  # the reference did not read it
        heads = {"A_log": None, "dt_bias": 0, "initial_state": 1}.get(name, 2)
        scale = 1.0 if wanted.any() else 0.0
        assert error(x, wanted, heads) < tolerance if scale else not x.any(), name


@pytest.mark.parametrize("cotangents", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_reference(gate: str, beta: str, layout: str, cotangents: tuple[bool, bool]) -> None:
    call = make_call(37, gate=gate, beta=beta, initial_state=True, dtype=torch.float64, **LAYOUTS[layout])
    assert_close(
        gradients(through_the_function, call, cotangents=cotangents),
        gradients(reference, call, cotangents=cotangents),
        1e-11,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"l2norm": False},
        {"state_v_first": True},
        {"H": 1, "HV": 1, "K": 1, "V": 1},
        {"H": 3, "HV": 3, "K": 7, "V": 5},
        {"H": 1, "HV": 3, "K": 5, "V": 48},
        {"T": 1},
        {"T": 64},
        {"T": 200, "H": 8, "HV": 8, "K": 128, "V": 4},  # several segments
        {"T": 300, "H": 8, "HV": 8, "K": 128, "V": 1, "cu_seqlens": [0, 130, 130, 290]},
    ],
    ids=str,
)
def test_gradients_follow_every_shape(options: dict[str, Any]) -> None:
    call = make_call(**{"T": 37, "initial_state": True, "dtype": torch.float64, **options})
    assert_close(gradients(through_the_function, call), gradients(reference, call), 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
def test_gradients_in_the_dtype_of_the_arguments(gate: str, dtype: torch.dtype, tolerance: float) -> None:
    call = make_call(70, gate=gate, dtype=dtype, initial_state=True)
    actual = gradients(through_the_function, call)
    assert all(x.dtype == call[name].dtype and x.shape == call[name].shape for name, x in actual.items())
    assert_close(actual, gradients(reference, {**call, "dtype": torch.float64}), tolerance)


@pytest.mark.parametrize("function", [through_the_function, through_the_op])
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck_passes_through_both_doors(function: Any, gate: str) -> None:
    call = make_call(5, gate=gate, K=3, V=2, initial_state=True, dtype=torch.float64)
    names = [name for name in DIFFERENTIABLE if name in call]
    leaves = requiring_grad(call)

    def of_leaves(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return function({**call, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(of_leaves, [leaves[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_doors_give_the_same_bits(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    door = EagerChunkKDA.apply
    monkeypatch.setattr(EagerChunkKDA, "apply", lambda *args: (taken.append(args), door(*args))[1])
    call = make_call(37, dtype=dtype, initial_state=True, **LAYOUTS[layout])
    eager = gradients(through_the_function, call)
    assert len(taken) == 1
    op = gradients(through_the_op, call)
    assert all(torch.equal(x, op[name]) for name, x in eager.items())
    assert len(taken) == 1


@pytest.mark.parametrize("function", [through_the_function, through_the_op])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_only_the_gradients_asked_for_are_computed(name: str, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(37, initial_state=True)
    every = gradients(function, call)
    masks = []
    compute = chunk_kda_backward.compute
    monkeypatch.setattr(chunk_kda_backward, "compute", lambda a: (masks.append(a.output_mask), compute(a))[1])
    only = gradients(function, call, (name,))
    assert torch.equal(only.pop(name), every[name])
    assert all(x is None for x in only.values())
    assert masks == [[n == name for n in DIFFERENTIABLE]]


def test_trailing_defaults_need_no_gradient() -> None:
    call = make_call(5, gate="precomputed", beta="raw", l2norm=False)
    tokens = requiring_grad({name: call[name] for name in TOKENS}, TOKENS)
    o = torch.ops.flashkda.chunk_kda(*tokens.values())[0]
    o.sum().backward()
    assert all(x.grad is not None for x in tokens.values())


@pytest.mark.parametrize("layout", [{"B": 2}, {"cu_seqlens": [0, 0, 0]}])
def test_no_tokens_pass_the_state_and_its_gradient_through(layout: dict[str, Any]) -> None:
    call = make_call(0, initial_state=True, **layout)
    leaves = requiring_grad(call)
    o, state = through_the_function(leaves)
    assert o.shape == call["v"].shape and torch.equal(state, call["initial_state"])
    cotangent = torch.randn(state.shape)
    state.backward(cotangent)
    assert torch.equal(leaves["initial_state"].grad, cotangent)
    assert not leaves["A_log"].grad.any() and not leaves["dt_bias"].grad.any()


@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
@pytest.mark.parametrize("bounds", [[0, 5, 5, 30], [7, 20, 30]])
def test_padding_rows_have_zero_gradients_and_leak_nothing(bounds: list[int], gate: str) -> None:
    call = make_call(40, gate=gate, cu_seqlens=bounds, initial_state=True)
    expected = gradients(through_the_function, call)
    inside = slice(bounds[0], bounds[-1])
    for name in TOKENS:
        call[name][:, : bounds[0]] = torch.nan
        call[name][:, bounds[-1] :] = torch.inf
    actual = gradients(through_the_function, call)
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name
        if name in TOKENS:
            outside = x.clone()
            outside[:, inside] = 0
            assert not outside.any() and x[:, inside].any(), name


def test_a_strided_cotangent_is_read_right() -> None:
    call = make_call(37)
    grads = []
    for leaves, stride in ((requiring_grad(call), False), (requiring_grad(call), True)):
        o, _ = chunk_kda(**leaves)
        cotangent = torch.linspace(-1, 1, o.numel()).view(o.shape)
        if stride:
            cotangent = cotangent.transpose(1, 3).contiguous().transpose(1, 3)
        o.backward(cotangent)
        grads.append([leaves[name].grad for name in TOKENS])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("function", [through_the_function, through_the_op])
def test_second_derivatives_raise(function: Any) -> None:
    call = requiring_grad(make_call(5), TOKENS)
    (grad,) = torch.autograd.grad(function(call)[0].sum(), call["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_backward_through_the_recurrent_ops_raises() -> None:
    call = requiring_grad(make_call(1), TOKENS)
    o, _ = recurrent_kda(**call)
    with pytest.raises(RuntimeError, match="recurrent_kda_paged"):
        o.sum().backward()
    pool, slots = torch.zeros(1, 4, 16, 8), torch.zeros(1, dtype=torch.int64)
    o = recurrent_kda_paged(**call, state_pool=pool, state_indices=slots)
    with pytest.raises(RuntimeError, match="recurrent_kda_paged"):
        o.sum().backward()


def test_a_frozen_call_records_nothing() -> None:
    call = make_call(5, initial_state=True)
    assert not chunk_kda(**call)[0].requires_grad
    with torch.no_grad():
        assert not chunk_kda(**requiring_grad(call))[0].requires_grad


@pytest.mark.parametrize("function", [through_the_function, through_the_op])
@pytest.mark.parametrize("absent", [0, 1])
def test_an_absent_cotangent_stays_absent(absent: int, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    compute = chunk_kda_backward.compute
    monkeypatch.setattr(chunk_kda_backward, "compute", lambda a: (given.append((a.do, a.dht)), compute(a))[1])
    gradients(function, make_call(5, initial_state=True), cotangents=(absent != 0, absent != 1))
    assert [x is None for x in given[0]] == [absent == 0, absent == 1]
