"""How far the portable path is from the fp64 recurrence: under 1e-5 in fp32, under 6e-3 in bf16, worst head included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import GATES, Call, make_call, output_error, reference

from flashkda_ops import chunk_kda, recurrent_kda

FIGURES = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


def parallel_keys(call: Call) -> Call:
    """One key in all tokens, up to a little noise, written with nearly full strength."""
    k = call["k"]
    call["k"] = (k[:, :1].float() + 1e-3 * torch.randn(k.shape, generator=torch.Generator().manual_seed(1))).to(k.dtype)
    call["beta"] = torch.full_like(call["beta"], 7.0 if call["use_beta_sigmoid_in_kernel"] else 0.999)
    return call


def as_they_are(call: Call) -> Call:
    return call


@pytest.mark.parametrize("dtype", FIGURES)
@pytest.mark.parametrize("keys", [as_they_are, parallel_keys])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("beta", ["raw", "sigmoid"])
def test_the_error_is_within_the_figures(gate: str, beta: str, keys: Any, dtype: torch.dtype) -> None:
    call = keys(make_call(400, K=64, V=32, gate=gate, beta=beta, dtype=dtype, initial_state=True))
    expected = reference(call)
    assert output_error(chunk_kda(**call, output_final_state=True), expected) < FIGURES[dtype]
    assert output_error(recurrent_kda(**call, output_final_state=True), expected) < FIGURES[dtype]


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_decays_far_below_fp32_are_harmless(scale: float) -> None:
    """Log decays down to -200 a token, beside channels that hardly decay."""
    call = make_call(130, K=32, gate="precomputed", initial_state=True)
    call["g"] = call["g"] * scale
    call["g"][..., ::3] *= 50
    call["g"][..., 1::3] *= 1e-4
    assert output_error(chunk_kda(**call, output_final_state=True), reference(call)) < 1e-5


@pytest.mark.parametrize("keys", [as_they_are, parallel_keys])
@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
def test_the_error_does_not_grow_over_16k_tokens(gate: str, keys: Any) -> None:
    call = keys(make_call(16384, H=2, HV=2, K=16, V=16, gate=gate))
    assert output_error(chunk_kda(**call, output_final_state=True), reference(call)) < FIGURES[torch.float32]
