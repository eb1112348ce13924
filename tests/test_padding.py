"""Heads of fewer than 128 channels, filled up: without a GPU on the portable path, which takes both widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DEFAULTS, DIFFERENTIABLE, Call, cotangents, error, kernel_call, make_call, reference

import flashkda_ops
from flashkda_ops import cuda, padding
from flashkda_ops.ops import chunk_kda, chunk_kda_backward, plans

CALLS: list[dict[str, Any]] = [
    {"K": 64, "V": 64},
    {"K": 64, "V": 128, "initial_state": True},
    {"K": 128, "V": 64, "initial_state": True, "state_v_first": True, "gate": "unbounded"},
    {"K": 96, "V": 80, "B": 2, "initial_state": True, "state_v_first": True, "gate": "bounded, no dt_bias"},
    {"K": 64, "V": 64, "initial_state": True, "gate": "precomputed", "beta": "negative eigenvalues", "l2norm": False},
    {"K": 64, "V": 64, "cu_seqlens": [0, 5, 5, 30, 35], "initial_state": True, "gate": "unbounded, no dt_bias"},
]


@pytest.fixture
def filled_up(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is planned, with narrow heads filled up on any device."""
    made, make = [], plans._make

    def make_padded(call: Any) -> plans.Plan:
        plan = make(call)
        made.append(plan._replace(padded=padding.fits(plan.sizes)))
        return made[-1]

    plans.clear()
    monkeypatch.setattr(plans, "_make", make_padded)
    yield made
    plans.clear()


def backward_arguments(call: Call) -> chunk_kda_backward.Arguments:
    do, dht = cotangents(call)
    mask = [call.get(name) is not None for name in DIFFERENTIABLE]
    return chunk_kda_backward.Arguments(**DEFAULTS | call | {"do": do, "dht": dht, "output_mask": mask})


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_filling_up_changes_no_result(options: dict[str, Any], filled_up: list[Any]) -> None:
    call = make_call(37, dtype=torch.float64, **options)
    arguments = chunk_kda.Arguments(**call, output_final_state=True)
    results = chunk_kda.op(*arguments)
    grads = chunk_kda_backward.op(*backward_arguments(call))
    assert [plan.padded for plan in filled_up] == [True, False]  # one for both directions, then that of the wide call
    assert {(plan.sizes.K, plan.sizes.V) for plan in filled_up[1:]} == {(128, 128)}
    plans.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padding, "fits", lambda s: False)
        expected = chunk_kda.op(*arguments)
        expected_grads = chunk_kda_backward.op(*backward_arguments(call))
    for x, y in zip((*results[:2], *grads), (*expected[:2], *expected_grads), strict=True):
        assert x.shape == y.shape and x.is_contiguous()
        assert y.numel() == 0 or error(x, y) < 1e-12


def test_the_width_alone_decides_what_is_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device_reason", lambda device: None)
    for K, V, dtype, pays in (
        (64, 64, torch.bfloat16, True),
        (128, 64, torch.float16, True),
        (128, 128, torch.bfloat16, False),
        (32, 64, torch.bfloat16, False),
        (64, 256, torch.bfloat16, False),
        (64, 64, torch.float32, False),
    ):
        call = make_call(9, K=K, V=V, dtype=dtype)
        tensors = [
            call.get(name) for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")
        ]
        sizes = chunk_kda._validate(chunk_kda.Arguments(**call))
        assert (padding.fits(sizes) and cuda.chunk_kda_reason(*tensors, any_width=True) is None) == pays


@pytest.mark.gpu
@pytest.mark.parametrize("options", [c for c in CALLS if "B" not in c], ids=str)
def test_the_kernels_serve_narrow_heads(options: dict[str, Any]) -> None:
    call = kernel_call(300, **options | ({"cu_seqlens": [0, 100, 100, 290]} if "cu_seqlens" in options else {}))
    arguments = chunk_kda.Arguments(**call)
    assert chunk_kda.plan(arguments).padded
    with torch.no_grad():
        o, state = flashkda_ops.chunk_kda(**call, output_final_state=True)
    for actual, expected in zip((o, state), reference(call), strict=True):
        assert error(actual, expected, heads=2 if actual is o else 1) < 8e-3
    a = backward_arguments(call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padding, "fits", lambda s: False)
        plans.clear()
        expected_grads = chunk_kda_backward.op(*a)
    plans.clear()
    for name, x, y in zip(DIFFERENTIABLE, chunk_kda_backward.op(*a), expected_grads, strict=True):
        assert y.numel() == 0 or error(x, y) < (5e-2 if name == "A_log" else 1e-2), name
