"""Prefill in shares: what fast gates need no other pass for, and what is left over to it, wherever shares begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Call, error, kernel_call, paged, reference

import flashkda_ops

pytestmark = pytest.mark.gpu

TOLERANCE = 8e-3

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"T": 1100, "H": 3, "HV": 12},
    "a batch": {"T": 700, "B": 3, "state_v_first": True},
    "four chunks a block": {"T": 512, "H": 16, "HV": 16},
    "halves left over": {"T": 2085, "H": 12, "HV": 12, "initial_state": False},
    "whole heads left over": {"T": 2048, "H": 24, "HV": 24, "dtype": torch.float16},
    "two pieces a head": {"T": 1210, "H": 32, "HV": 64},
    "one sequence": {"T": 1500, "cu_seqlens": [0, 1500], "H": 8, "HV": 8},
    "packed": {"T": 3000, "cu_seqlens": [0, 1, 1, 1000, 1017, 2900], "gate": "unbounded"},
    "packed, more heads": {"T": 1500, "cu_seqlens": [0, 375, 750, 1125, 1500], "H": 16, "HV": 16},
    "fp32 gates": {"T": 2048, "gate": "precomputed", "H": 12, "HV": 12},
}


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        o, state = flashkda_ops.chunk_kda(**call, output_final_state=True)
    return o, state


def whole(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return run(call | {"batch_invariant": True})


def shape(name: str, slow_heads: int) -> Call:
    call = kernel_call(**SHAPES[name], slow_heads=slow_heads)
    return call | ({"g": call["g"].float()} if name == "fp32 gates" else {})


@pytest.mark.parametrize("name", SHAPES)
def test_gates_that_forget_give_what_whole_sequences_give(name: str) -> None:
    call = shape(name, slow_heads=0)
    if name == "fp32 gates":
        call["g"] *= 4
    results = run(call)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(call), results, strict=True))
    assert all(error(a, b) < 1e-6 for a, b in zip(results, whole(call), strict=True))
    assert all(error(a, b) < TOLERANCE for a, b in zip(results, reference(call), strict=True))


@pytest.mark.parametrize("slow", ["some", "all"])
@pytest.mark.parametrize("name", SHAPES)
def test_heads_that_do_not_are_left_over(name: str, slow: str) -> None:
    heads = SHAPES[name].get("HV", 4)
    call = shape(name, slow_heads=heads if slow == "all" else heads // 2)
    results = run(call)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(call), results, strict=True))
    expected = reference(call)
    for actual, at_once, exact in zip(results, whole(call), expected, strict=True):
        assert error(actual, exact, heads=1 if actual is results[1] else 2) < TOLERANCE
        assert error(actual, exact) < 1.15 * error(at_once, exact) + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_blocks_that_give_up_wait_for_no_bytes_twice(dtype: torch.dtype) -> None:
    """A hang: gates of a transform warp's chunk that come before those of an earlier one, where both are given up."""
    calls = []
    for seed in range(12):  # three times the L2 cache, so that bytes come in any order
        call = kernel_call(512, H=16, HV=16, gate="precomputed", slow_heads=16, seed=seed)
        q, k, v = torch.cat([call[name] for name in "qkv"], 2).chunk(3, 2)  # rows far from each other
        calls.append(call | {"q": q, "k": k, "v": v, "g": call["g"].to(dtype)})
    expected = [run(call) for call in calls]
    for _ in range(300):
        results = [run(call) for call in calls]
        torch.cuda.synchronize()
    for result, first in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


def test_channels_of_values_of_any_size_go_through_segments() -> None:
    call = kernel_call(2048, H=12, HV=12, slow_heads=12, initial_state=False)
    sizes = torch.exp2(torch.arange(128, device="cuda") % 49 - 24)  # powers of two: results scale with them
    expected, state = run(call)
    for result, exact in zip(
        run(call | {"v": call["v"] * sizes.bfloat16()}), (expected * sizes, state * sizes), strict=True
    ):
        assert torch.equal(result.float(), exact.float())


@pytest.mark.parametrize("channels", [slice(0, 128), slice(5, 6)], ids=["all channels", "one channel"])
def test_a_stretch_that_remembers_is_found_wherever_it_lies(channels: slice) -> None:
    call = kernel_call(2048, H=12, HV=12, slow_heads=0)
    for begin in range(0, 2048, 100):
        slow = call | {"g": call["g"].clone()}
        slow["g"][:, begin : begin + 150, begin % 12, channels] -= 12
        for actual, expected in zip(run(slow), whole(slow), strict=True):
            assert error(actual, expected) < 2e-3


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "precomputed"},
        {"gate": "precomputed", "beta": "negative eigenvalues"},
        {"gate": "precomputed", "l2norm": False, "beta": "raw"},
        {"gate": "bounded"},
        {"gate": "unbounded"},
    ],
    ids=lambda options: ", ".join(map(str, options.values())),
)
def test_gates_of_any_speed(options: dict[str, Any]) -> None:
    call = kernel_call(2048, H=12, HV=12, slow_heads=0, **options)
    if options["gate"] == "precomputed":
        speeds = torch.tensor([1e-3, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.7, 2.5], device="cuda")
        call["g"] *= speeds[:, None]
        call["g"][:, :, ::2] = -speeds[::2, None]  # all channels alike
    else:
        call["dt_bias"] -= torch.linspace(0, 4, 12, device="cuda")[:, None]
    call["k"] *= 4 if options.get("l2norm", True) else 1
    results, at_once = run(call), whole(call)
    assert error(results[0], at_once[0], heads=2) < 6e-3
    assert error(results[1], at_once[1], heads=1) < 6e-3


def test_streams_do_not_wait_for_each_other_for_ever() -> None:
    calls = [kernel_call(2048, H=12, HV=12, slow_heads=6 * (i % 3), seed=i) for i in range(4)]
    expected = [run(call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(call))
    torch.cuda.synchronize()
    for pair, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, wanted, strict=True))


@pytest.mark.parametrize("slow_heads", [0, 2, 4])
def test_rows_of_a_pool_without_history_and_padding(slow_heads: int) -> None:
    call = kernel_call(3000, cu_seqlens=[0, 1000, 1000, 1033, 2000, 2900], slow_heads=slow_heads)
    call["initial_state"][3] = 0
    o, state = run(call)
    pool = torch.randn(8, *state.shape[1:], device="cuda")
    before = pool.clone()
    slots = torch.tensor([5, 1, 0, 7, -1], device="cuda")
    pool[slots[:3]] = call["initial_state"][:3]
    history = torch.tensor([True, True, True, False, True], device="cuda")
    o_paged = flashkda_ops.chunk_kda_paged(**paged(call, pool, slots), has_initial_state=history)
    assert torch.equal(o_paged[:, :2000], o[:, :2000]) and not o_paged[:, 2000:].any()
    assert torch.equal(pool[[5, 0, 7]], state[[0, 2, 3]])
    assert torch.equal(pool[1], call["initial_state"][1])  # the empty sequence
    assert torch.equal(pool[[2, 3, 4, 6]], before[[2, 3, 4, 6]])
