"""The prefill kernel, through the op, against the fp64 reference and against the contract."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from helpers import BETAS, GATES, TOKENS, Call, error, graph_of, kernel_call, paged, random_cu_seqlens, reference

import flashkda_ops
from flashkda_ops import cuda

pytestmark = pytest.mark.gpu

TOLERANCE = 8e-3
"""bf16 operands give about 3.5e-3 over a tensor, and up to twice that in a head whose keys are nearly parallel."""


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The public function, on a call that the kernel serves."""
    arguments = (call.get(name) for name in (*TOKENS, "A_log", "dt_bias", "initial_state", "cu_seqlens"))
    assert cuda.chunk_kda_reason(*arguments) is None  # type: ignore[arg-type]
    with torch.no_grad():
        o, state = flashkda_ops.chunk_kda(**call, output_final_state=True)
    return o, state


def errors(call: Call) -> list[float]:
    (o, state), (o_ref, state_ref) = run(call), reference(call)
    assert o.isfinite().all() and state.isfinite().all()
    return [error(o, o_ref, heads=2), error(state, state_ref, heads=1)]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_agrees_with_the_reference_in_every_mode(gate: str, beta: str) -> None:
    assert max(errors(kernel_call(150, gate=gate, beta=beta))) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"T": 1},
        {"T": 16},
        {"T": 37, "B": 3, "H": 5, "HV": 5},
        {"T": 1024, "H": 3, "HV": 3},
        {"T": 100, "H": 2, "HV": 6},
        {"T": 100, "l2norm": False},
        {"T": 100, "state_v_first": True},
        {"T": 100, "initial_state": False},
        {"T": 200, "dtype": torch.float16},
        {"T": 50, "B": 5, "H": 70, "HV": 70},
        {"T": 300, "cu_seqlens": [0, 100, 101, 133, 300]},
        {"T": 200, "cu_seqlens": [0, 0, 77, 77, 77, 200, 200]},
        {"T": 64, "cu_seqlens": list(range(65))},
        {"T": 700, "H": 64, "HV": 64, "cu_seqlens": [0, 100, 117, 317, 500, 700], "state_v_first": True},
    ],
    ids=str,
)
def test_agrees_with_the_reference_in_every_shape(options: dict[str, Any]) -> None:
    assert max(errors(kernel_call(**options))) < TOLERANCE


@pytest.mark.parametrize("names", [("g",), ("beta",), ("g", "beta")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_g_and_beta_may_be_fp32(names: tuple[str, ...], dtype: torch.dtype) -> None:
    call = kernel_call(100, dtype=dtype)
    assert max(errors(call | {name: call[name].float() for name in names})) < TOLERANCE


def test_takes_what_transformers_passes() -> None:
    call = kernel_call(200, B=2, HV=2, gate="precomputed", beta="raw")
    fused = torch.cat([call[name].flatten(2) for name in ("q", "k", "v")], -1)
    q, k, v = (x.unflatten(-1, (2, 128)) for x in fused.chunk(3, -1))
    assert not q.is_contiguous()
    assert max(errors(call | {"q": q, "k": k, "v": v, "g": call["g"].float()})) < TOLERANCE


def test_any_strides_give_the_same_bits() -> None:
    call = kernel_call(90, B=2)
    expected = run(call)
    for views in (
        {name: call[name].transpose(1, 2).contiguous().transpose(1, 2) for name in TOKENS},
        {name: torch.stack((call[name], call[name]), -1)[..., 0] for name in TOKENS},  # last dimension strided
        {name: torch.cat((call[name][..., :3], call[name]), -1)[..., 3:] for name in ("q", "k", "v", "g")},  # unaligned
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(call | views), expected, strict=True))


def test_nearly_parallel_keys_stay_finite_and_close() -> None:
    call = kernel_call(400, beta="raw")
    call["k"] = (torch.randn(1, 1, 2, 128, device="cuda") + 0.02 * call["k"].float()).bfloat16()
    call["beta"] = torch.full_like(call["beta"], 0.98)
    o_error, state_error = errors(call)
    assert o_error < 1e-2
    # Little is left of the state along the one key, so rounding weighs more: bench_accuracy.py measures 6e-2 of fla.
    assert state_error < 4e-2


def test_alpha_near_one_with_beta_near_two_stays_finite_and_close() -> None:
    call = kernel_call(600, beta="negative eigenvalues")
    call["dt_bias"] -= 8
    call["beta"] = torch.full_like(call["beta"], 6.0)
    assert max(errors(call)) < 2e-2


@pytest.mark.parametrize(("T", "cu"), [(200, [0, 50, 130, 170]), (3000, [0, 500, 1300, 2700])], ids=["whole", "shares"])
def test_rows_of_other_sequences_and_of_padding_never_leak(T: int, cu: list[int]) -> None:
    call = kernel_call(T, cu_seqlens=cu)
    _, first, second, end = cu
    o, state = run(call)
    poisoned = dict(call)
    for name in TOKENS:
        poisoned[name] = call[name].clone()
        poisoned[name][:, first:second] = torch.nan
        poisoned[name][:, end:] = torch.nan
    o_poisoned, state_poisoned = run(poisoned)
    kept = [*range(first), *range(second, T)]
    assert torch.equal(o_poisoned[:, kept], o[:, kept]) and not o[:, end:].any()
    assert torch.equal(state_poisoned[[0, 2]], state[[0, 2]])


@pytest.mark.parametrize("T", [100, 3000], ids=["whole", "shares"])
@pytest.mark.parametrize(
    "cu", [[0, 50, 30, 100], [-5, 40, 1000, 2000], [90, 10, 5, 100], [300, 200, 100, 0], [-3, -2, -1, -1]]
)
def test_a_malformed_cu_seqlens_is_taken_as_its_clamped_running_maximum(cu: list[int], T: int) -> None:
    cu = [i * T // 100 for i in cu]
    call = kernel_call(T, cu_seqlens=cu)
    safe = torch.tensor(cu, device="cuda").clamp(0, T).cummax(0).values
    assert all(torch.equal(a, b) for a, b in zip(run(call), run(call | {"cu_seqlens": safe}), strict=True))


@pytest.mark.parametrize("lengths", [[70] * 12 + [0] * 20, [1, 0, 17, 0, 5, 0, 70, 0] * 12], ids=["behind", "between"])
def test_empty_sequences_behind_short_ones_keep_the_pipeline_going(lengths: list[int]) -> None:
    cu_seqlens = [0, *itertools.accumulate(lengths)]
    assert max(errors(kernel_call(cu_seqlens[-1], H=16, HV=16, cu_seqlens=cu_seqlens))) < TOLERANCE


def test_the_same_bits_on_every_run_and_in_any_batch() -> None:
    call = kernel_call(700, H=24, HV=24, cu_seqlens=[0, 100, 117, 317, 500, 700]) | {"batch_invariant": True}
    o, state = run(call)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(call), (o, state), strict=True))
    alone = {**call, **{name: call[name][:, 117:317] for name in TOKENS}}
    alone |= {"initial_state": call["initial_state"][2:3], "cu_seqlens": None}
    o_alone, state_alone = run(alone)
    assert torch.equal(o[:, 117:317], o_alone) and torch.equal(state[2:3], state_alone)


@pytest.mark.parametrize(
    "options",
    [
        {"T": 1100},
        {"T": 1100, "B": 3, "state_v_first": True},
        {"T": 2085, "H": 1, "HV": 1, "gate": "unbounded"},
        {"T": 1100, "H": 2, "HV": 6, "gate": "precomputed", "dtype": torch.float16},
        {"T": 1100, "initial_state": False},
        {"T": 777, "H": 24, "HV": 24},
    ],
    ids=str,
)
@pytest.mark.parametrize("slow", ["none", "some", "all"])
def test_a_call_in_segments_is_as_close_as_one_that_is_not(options: dict[str, Any], slow: str) -> None:
    heads = options.get("HV", 4)
    call = kernel_call(**options, slow_heads={"none": 0, "some": (heads + 1) // 2, "all": heads}[slow])
    o, state = run(call)
    assert all(torch.equal(a, b) for a, b in zip(run(call), (o, state), strict=True))
    expected = reference(call)
    one = run(call | {"batch_invariant": True})
    for actual, whole, exact in zip((o, state), one, expected, strict=True):
        assert error(actual, exact, heads=1 if actual is state else 2) < TOLERANCE
        assert error(actual, exact) < 1.15 * error(whole, exact) + 1e-5


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
def test_states_of_any_size_enter_segments(size: float) -> None:
    call = kernel_call(1100, slow_heads=4)
    call["v"] *= 1000
    call["initial_state"] *= size
    for actual, exact in zip(run(call), reference(call), strict=True):
        assert actual.isfinite().all() and error(actual, exact) < TOLERANCE


@pytest.mark.parametrize("slow", [slice(0, 64), slice(64, 128), slice(32, 96)], ids=str)
def test_some_channels_of_a_head_may_forget_alone(slow: slice) -> None:
    call = kernel_call(1100, slow_heads=0)
    call["dt_bias"][:, slow] -= 6
    expected = reference(call)
    one = run(call | {"batch_invariant": True})
    torch.full((2**24,), torch.nan, device="cuda")  # what the workspace may hold
    for actual, whole, exact in zip(run(call), one, expected, strict=True):
        assert error(actual, exact) < 1.15 * error(whole, exact) + 1e-5


def test_gates_of_any_speed_enter_segments() -> None:
    """Of all tokens of a head the same, or of every third chunk others: wherever segments end, the last chunk of some
    lets go of much, and those before it of nothing."""
    call = kernel_call(1100, H=12, HV=12, gate="precomputed")
    speeds = torch.full((69, 12), 1e-3)
    speeds[:, :6] = torch.tensor([1e-3, 0.01, 0.1, 0.3, 0.6, 2.0])
    for head in range(6, 12):
        speeds[head % 3 :: 3, head] = (0.6, 0.3)[head // 9]
    call["g"][:] = -speeds.repeat_interleave(16, 0)[:1100, :, None]
    expected = reference(call)
    one = run(call | {"batch_invariant": True})
    for actual, whole, exact in zip(run(call), one, expected, strict=True):
        assert error(actual, exact) < 1.15 * error(whole, exact) + 1e-5


@pytest.mark.parametrize(
    "sizes", [[(512, 6), (256, 3)], [(3000, 3), (1500, 2), (1100, 0)]], ids=["whole", "shares, and a dense call"]
)
def test_captured_calls_replay_with_any_sequences_and_gates_interleaved(sizes: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    captured = []
    for T, N in sizes:
        call = kernel_call(T, H=4, cu_seqlens=[0] + [T] * N if N else None)
        graph, results = graph_of(functools.partial(run, call))
        captured.append((T, N, call, graph, results, torch.cuda.Stream()))
    for replay in range(50):
        for T, N, call, graph, results, side in captured:
            for name in TOKENS:
                call[name].normal_()
            call["g"][:, :, : replay % 5] -= 8  # heads whose gates are slow
            if N:
                cu = random_cu_seqlens(T, N, generator)
                call["cu_seqlens"].copy_(cu)
                for name in TOKENS:
                    call[name][:, int(cu[-1]) :] = torch.nan
            for result in results:
                result.fill_(torch.nan)
            torch.cuda.synchronize()
            with torch.cuda.stream(side if replay % 2 else torch.cuda.current_stream()):
                graph.replay()
        torch.cuda.synchronize()
        for T, N, call, _, results, _ in captured:
            end = int(call["cu_seqlens"][-1]) if N else T
            assert all(torch.equal(a, b) for a, b in zip(results, run(call), strict=True))
            assert not results[0][:, end:].any()


def test_paged_prefill_equals_prefill_on_the_rows_of_its_pool() -> None:
    call = kernel_call(300, cu_seqlens=[0, 100, 100, 133, 300])
    o, state = run(call)
    pool = torch.randn(7, *state.shape[1:], device="cuda")
    before = pool.clone()
    slots = torch.tensor([5, 1, 0, -1], device="cuda")
    pool[slots[:3]] = call["initial_state"][:3]
    o_paged = flashkda_ops.chunk_kda_paged(**paged(call, pool, slots))
    assert torch.equal(o_paged[:, :133], o[:, :133]) and not o_paged[:, 133:].any()
    assert torch.equal(pool[[5, 0]], state[[0, 2]])
    assert torch.equal(pool[1], call["initial_state"][1])  # the empty sequence
    assert torch.equal(pool[[2, 3, 4, 6]], before[[2, 3, 4, 6]])


def test_one_compiled_callable_serves_differing_sequences() -> None:
    call = kernel_call(256, cu_seqlens=[0, 60, 100, 256])
    options = {name: x for name, x in call.items() if name not in TOKENS}

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return flashkda_ops.chunk_kda(q, k, v, g, beta, **options)[0] * 2

    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    tokens = [call[name] for name in TOKENS]
    with torch.no_grad():
        for cu in ([0, 60, 100, 256], [0, 0, 1, 200], [0, 256, 256, 256]):
            call["cu_seqlens"].copy_(torch.tensor(cu))
            for _ in range(3):
                assert torch.equal(compiled(*tokens), layer(*tokens))
