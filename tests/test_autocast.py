"""Autocast: q, k, v in its dtype; gates as precise as they came; parameters and states in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DIFFERENTIABLE, Call, make_call, paged, requiring_grad
from torch import Tensor

from flashkda_ops import chunk_kda, chunk_kda_paged, recurrent_kda, recurrent_kda_paged


def lowered(call: Call, dtype: torch.dtype = torch.bfloat16) -> Call:
    """The call as autocast should make it."""
    return {**call, **{name: call[name].to(dtype) for name in ("q", "k", "v")}}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [chunk_kda, recurrent_kda])
def test_tokens_are_cast_and_gates_parameters_and_states_are_not(
    function: Any, dtype: torch.dtype, device: str
) -> None:
    call = make_call(20, B=2, initial_state=True, device=device)
    expected = function(**lowered(call, dtype), output_final_state=True)
    with torch.autocast(device, dtype):
        actual = function(**call, output_final_state=True)
    assert (actual[0].dtype, actual[1].dtype) == (dtype, torch.float32)
    for x, wanted in zip(actual, expected, strict=True):
        assert torch.equal(x, wanted)


@pytest.mark.parametrize("function", [chunk_kda_paged, recurrent_kda_paged])
def test_a_pool_stays_as_it_is(function: Any) -> None:
    pools = [torch.randn(5, 4, 16, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    call = make_call(3, B=2)
    expected = function(**paged(lowered(call), pools[0], torch.tensor([3, 0])))
    with torch.autocast("cpu", torch.bfloat16):
        actual = function(**paged(call, pools[1], torch.tensor([3, 0])))
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)
    assert torch.equal(pools[0], pools[1])


def test_16_bit_gates_follow_the_tokens() -> None:
    call = make_call(9, B=2)
    call = {**call, "g": call["g"].bfloat16(), "beta": call["beta"].bfloat16()}
    expected = chunk_kda(**{**lowered(call, torch.float16), "g": call["g"].half(), "beta": call["beta"].half()})[0]
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(chunk_kda(**call)[0], expected)


def test_fp64_is_left_alone() -> None:
    call = make_call(9, B=2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert chunk_kda(**call)[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "dtype"), [("q", torch.int64), ("k", torch.float64), ("beta", torch.float64)], ids=str
)
def test_what_is_an_error_without_it_stays_one(name: str, dtype: torch.dtype) -> None:
    call = make_call(9, B=2)
    call[name] = call[name].to(dtype)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=f"{name} must be"):
        chunk_kda(**call)


def test_autocast_that_is_off_does_nothing() -> None:
    call = make_call(9, B=2)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert chunk_kda(**call)[0].dtype == torch.float32


def through_the_function(**call: Any) -> Tensor:
    return chunk_kda(**call)[0]


def through_the_op(**call: Any) -> Tensor:
    return torch.ops.flashkda.chunk_kda(**call)[0]


@pytest.mark.parametrize("during_backward", [False, True])
@pytest.mark.parametrize("function", [through_the_function, through_the_op])
def test_gradients_come_in_the_dtypes_of_the_inputs(function: Any, during_backward: bool) -> None:
    call, reference = (requiring_grad(make_call(20, B=2)) for _ in range(2))
    through_the_function(**lowered(reference)).float().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = function(**call).float().square().sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=during_backward):
        loss.backward()
    for name in DIFFERENTIABLE:
        if name in call:
            assert call[name].grad.dtype == torch.float32
            assert torch.equal(call[name].grad, reference[name].grad), name
