"""The portable path is within 1e-5 of the fp64 recurrence in fp32 and 6e-3 in bf16, worst head included."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import GATES, TOKENS, Call, make_call, output_error, reference

from flashkda_ops import chunk_kda, recurrent_kda
from flashkda_ops.reference import beta_activation, l2norm, log_decay

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


def precomputed(call: Call) -> Call:
    """The call in fp64 with its norms, gates and beta applied, so that calls of any options can stand side by side."""
    x = {name: call[name].double() for name in TOKENS}
    gate = {name: call.get(name) for name in ("A_log", "dt_bias", "lower_bound")}
    options = ("use_beta_sigmoid_in_kernel", "allow_neg_eigval")
    return {
        **x,
        "q": l2norm(x["q"]),
        "k": l2norm(x["k"]),
        "g": log_decay(x["g"], **gate, use_gate_in_kernel=call.get("use_gate_in_kernel", False)),
        "beta": beta_activation(x["beta"], **{name: call[name] for name in options}),
    }


def test_the_error_does_not_grow_over_16k_tokens() -> None:
    calls = [
        keys(make_call(16384, H=2, HV=2, K=16, V=16, gate=gate))
        for gate, keys in itertools.product(GATES, (as_they_are, parallel_keys))
    ]
    parts = [precomputed(call) for call in calls]
    expected = reference({name: torch.cat([part[name] for part in parts], 2) for name in TOKENS})
    for call, o, state in zip(calls, expected[0].split(2, 2), expected[1].split(2, 1), strict=True):
        assert output_error(chunk_kda(**call, output_final_state=True), (o, state)) < FIGURES[torch.float32]
