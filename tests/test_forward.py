"""The portable forward pass is the recurrence, over every option and layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import BETAS, GATES, TOKENS, Call, error, make_call, output_error, reference, requiring_grad, rows

from flashkda_ops import chunk_kda, recurrent_kda
from flashkda_ops.portable import num_checkpoints

LENGTHS = (0, 1, 2, 31, 32, 33, 63, 64, 65, 130)
LAYOUTS: dict[str, dict[str, Any]] = {"dense": {"B": 2}, "packed": {"cu_seqlens": [0, 3, 3, 40, 70]}}


def run(call: Call, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    o, state = chunk_kda(**{**call, "output_final_state": True, **changes})
    return o, state


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_every_option_follows_the_recurrence(
    gate: str, beta: str, l2norm: bool, layout: str, state_v_first: bool
) -> None:
    call = make_call(
        70, gate=gate, beta=beta, l2norm=l2norm, initial_state=True, state_v_first=state_v_first, **LAYOUTS[layout]
    )
    assert output_error(run(call), reference(call)) < 2e-6


@pytest.mark.parametrize("function", [chunk_kda, recurrent_kda])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_are_optional(function: Any, layout: str) -> None:
    call = make_call(70, **LAYOUTS[layout])
    o, state = function(**call)
    assert state is None
    assert output_error(function(**call, output_final_state=True), reference(call)) < 2e-6
    assert torch.equal(o, function(**call, output_final_state=True)[0])


@pytest.mark.parametrize("K", [1, 7, 48, 64, 128])
@pytest.mark.parametrize("V", [1, 7, 48, 64, 128])
def test_any_head_size_works(K: int, V: int) -> None:
    call = make_call(66, K=K, V=V, initial_state=True)
    assert output_error(run(call), reference(call)) < 2e-6


@pytest.mark.parametrize(("H", "HV"), [(1, 1), (1, 3), (2, 6), (3, 3)])
def test_value_heads_share_queries_and_keys_in_groups(H: int, HV: int) -> None:
    call = make_call(40, B=2, H=H, HV=HV, initial_state=True)
    assert output_error(run(call), reference(call)) < 2e-6


@pytest.mark.parametrize("T", LENGTHS)
def test_any_length_works(T: int) -> None:
    call = make_call(T, B=2, initial_state=True)
    assert output_error(run(call), reference(call)) < 2e-6


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sequences_of_any_lengths_are_packed(index_dtype: torch.dtype) -> None:
    ends = torch.tensor((0, *LENGTHS, 0, 0, 5)).cumsum(0)
    call = make_call(int(ends[-1]), cu_seqlens=ends.tolist(), initial_state=True)
    call["cu_seqlens"] = ends.to(index_dtype)
    o, state = run(call)
    assert output_error((o, state), reference(call)) < 2e-6
    empty = ends.diff() == 0
    assert torch.equal(state[empty], call["initial_state"][empty])


@pytest.mark.parametrize("layout", [{"B": 2}, {"cu_seqlens": [0, 150, 150, 300]}])
def test_a_call_of_several_segments_follows_the_recurrence(layout: dict[str, Any]) -> None:
    call = make_call(300, H=4, HV=8, K=128, V=16, initial_state=True, **layout)
    assert output_error(run(call), reference(call)) < 2e-6


@pytest.mark.parametrize("wide", [(), ("g",), ("beta",), ("g", "beta")])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 6e-3), (torch.float16, 8e-4), (torch.float32, 2e-6), (torch.float64, 1e-14)],
)
def test_every_dtype_computes_in_fp32_or_better(dtype: torch.dtype, tolerance: float, wide: tuple[str, ...]) -> None:
    call = make_call(70, dtype=dtype, initial_state=True)
    if dtype.itemsize == 2:
        call.update({name: call[name].float() for name in wide})
    o, state = run(call)
    assert o.dtype == dtype and state.dtype == call["A_log"].dtype
    expected = reference(call)
    assert error(o, expected[0], heads=2) < tolerance
    assert error(state, expected[1], heads=1) < min(tolerance, 2e-6)


@pytest.mark.parametrize("scale", [None, 0.0, 1.0, -0.3])
def test_scale_multiplies_the_output(scale: float | None) -> None:
    call = make_call(40, dtype=torch.float64)
    unit, _ = run(call, scale=1.0)
    o, _ = run(call, scale=scale)
    torch.testing.assert_close(o, unit * (16**-0.5 if scale is None else scale))


def test_dt_bias_may_be_flat() -> None:
    call = make_call(40)
    assert torch.equal(run(call)[0], run(call, dt_bias=call["dt_bias"].flatten())[0])


def test_gate_arguments_are_unused_without_the_gate() -> None:
    call = make_call(40, gate="precomputed")
    extra = {"A_log": torch.full((4,), torch.nan), "dt_bias": torch.full((4, 16), torch.nan), "lower_bound": -1.0}
    assert torch.equal(chunk_kda(**call)[0], chunk_kda(**call, **extra)[0])
    assert torch.equal(recurrent_kda(**call)[0], recurrent_kda(**call, **extra)[0])


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("chunk_size", [32, 64])
@pytest.mark.parametrize("layout", [{"B": 2}, {"cu_seqlens": [0, 1, 1, 100, 165]}])
def test_intermediate_states_are_those_of_prefixes(
    layout: dict[str, Any], chunk_size: int, state_v_first: bool
) -> None:
    call = make_call(165, initial_state=True, state_v_first=state_v_first, **layout)
    with torch.no_grad():
        o, final, states = chunk_kda(
            **call, output_final_state=True, return_intermediate_states=True, chunk_size=chunk_size
        )
    assert output_error((o, final), reference(call)) < 2e-6
    bounds = layout.get("cu_seqlens")
    N = len(bounds) - 1 if bounds else 2
    NT = num_checkpoints(165, N, chunk_size, packed=bounds is not None)
    assert states.shape == (1 if bounds else 2, NT, *final.shape[1:])
    # The state before every chunk_size-th token is the final state of a call that ends there.
    if bounds:
        spans = [(n, a, t) for n, (a, b) in enumerate(itertools.pairwise(bounds)) for t in range(a, b, chunk_size)]
        prefixes = [
            {**rows(call, a, t), "initial_state": call["initial_state"][n : n + 1], "cu_seqlens": None}
            for n, a, t in spans
        ]
        expected = torch.cat([reference(prefix)[1] for prefix in prefixes]).unsqueeze(0)
        assert not states[:, len(spans) :].any()
    else:
        expected = torch.stack([reference(rows(call, 0, t))[1] for t in range(0, 165, chunk_size)], 1)
    assert error(states[:, : expected.shape[1]], expected, heads=2) < 2e-6


@pytest.mark.parametrize("interval", [16, 48, 96])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_intermediate_states_have_any_distance_the_op_takes(interval: int, batch_invariant: bool) -> None:
    bounds = [4, 5, 5, 21, 130, 165]
    call = make_call(170, initial_state=True, cu_seqlens=bounds)
    options = {"output_final_state": True, "checkpoint_interval": interval, "batch_invariant": batch_invariant}
    o, final, states = torch.ops.flashkda.chunk_kda(**call, **options)
    assert output_error((o, final), reference(call)) < 2e-6
    spans = [(n, a, t) for n, (a, b) in enumerate(itertools.pairwise(bounds)) for t in range(a, b, interval)]
    single = {**call, "cu_seqlens": None}
    expected = [
        reference({**rows(single, a, t), "initial_state": call["initial_state"][n : n + 1]})[1] for n, a, t in spans
    ]
    assert error(states[:, : len(spans)], torch.cat(expected).unsqueeze(0), heads=2) < 2e-6
    assert not states[:, len(spans) :].any()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("state_v_first", [False, True])
def test_the_recurrent_function_agrees_and_leaves_its_state(gate: str, state_v_first: bool) -> None:
    call = make_call(5, B=3, gate=gate, initial_state=True, state_v_first=state_v_first)
    before = call["initial_state"].clone()
    assert output_error(recurrent_kda(**call, output_final_state=True), reference(call)) < 2e-6
    assert torch.equal(call["initial_state"], before)


@pytest.mark.parametrize("gate", ["precomputed", "bounded"])
def test_flash_linear_attention_has_the_same_definition(gate: str) -> None:
    naive = pytest.importorskip("fla.ops.kda.naive").naive_recurrent_kda
    gates = pytest.importorskip("fla.ops.kda.gate")
    call = make_call(70, B=2, gate=gate, beta="raw", l2norm=False, initial_state=True)
    g = call["g"]
    if gate == "bounded":
        g = gates.naive_kda_lowerbound_gate(g, call["A_log"], call["dt_bias"].flatten(), call["lower_bound"])
    o, state = naive(
        *(call[name] for name in ("q", "k", "v")), g, call["beta"],
        initial_state=call["initial_state"], output_final_state=True,
    )  # fmt: skip
    actual = run(call)
    assert error(actual[0], o) < 5e-6 and error(actual[1], state) < 5e-6


# ---------------------------------------------------------------------------------------------------------------------
# Layouts in memory
# ---------------------------------------------------------------------------------------------------------------------


def fused_slices(call: Call) -> Call:
    """q, k, v as slices of one projection."""
    parts = [call[name].flatten(2) for name in ("q", "k", "v")]
    fused = torch.cat(parts, dim=-1).split([x.shape[-1] for x in parts], dim=-1)
    return {**call, **{n: x.unflatten(-1, call[n].shape[2:]) for n, x in zip(("q", "k", "v"), fused, strict=True)}}


def last_dimension_strided(call: Call) -> Call:
    return {**call, **{n: call[n].transpose(1, -1).contiguous().transpose(1, -1) for n in TOKENS}}


def heads_outside_tokens(call: Call) -> Call:
    return {**call, **{n: call[n].transpose(1, 2).contiguous().transpose(1, 2) for n in TOKENS}}


def every_other_token(call: Call) -> Call:
    return {**call, **{n: call[n].repeat_interleave(2, 1)[:, ::2] for n in TOKENS}}


@pytest.mark.parametrize("stride", [fused_slices, last_dimension_strided, heads_outside_tokens, every_other_token])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit(stride: Any, layout: str, dtype: torch.dtype) -> None:
    call = make_call(70, K=48, V=40, dtype=dtype, initial_state=True, **LAYOUTS[layout])
    strided = stride(call)
    assert not strided["v"].is_contiguous()
    for actual, expected in zip(run(strided), run(call), strict=True):
        assert actual.is_contiguous() and torch.equal(actual, expected)


def test_expanded_arguments_are_read_right() -> None:
    call = make_call(40, B=3, initial_state=True)
    expanded = {n: call[n][:1].expand_as(call[n]) for n in (*TOKENS, "initial_state")}
    copied = {n: x.contiguous() for n, x in expanded.items()}
    for actual, expected in zip(run(call, **expanded), run(call, **copied), strict=True):
        assert torch.equal(actual, expected)


def test_strided_states_gates_and_offsets_are_read_right() -> None:
    call = make_call(70, cu_seqlens=[0, 3, 3, 40, 70], initial_state=True)
    strided = {
        "cu_seqlens": call["cu_seqlens"].repeat_interleave(2)[::2],
        "initial_state": call["initial_state"].mT.contiguous().mT,
        "A_log": call["A_log"].repeat_interleave(3)[::3],
        "dt_bias": call["dt_bias"].mT.contiguous().mT,
    }
    assert not any(x.is_contiguous() for x in strided.values())
    for actual, expected in zip(run(call, **strided), run(call), strict=True):
        assert torch.equal(actual, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Padding and malformed cu_seqlens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
@pytest.mark.parametrize("bounds", [[0, 5, 5, 40], [7, 20, 40], [3, 3, 3]])
def test_padding_rows_give_zeros_and_leak_nothing(bounds: list[int], gate: str) -> None:
    call = make_call(50, gate=gate, cu_seqlens=bounds, initial_state=True)
    expected = run(call)
    for name in TOKENS:
        call[name][:, : bounds[0]] = torch.nan
        call[name][:, bounds[-1] :] = torch.inf
    o, state = run(call)
    assert not o[:, : bounds[0]].any() and not o[:, bounds[-1] :].any()
    assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])


@pytest.mark.parametrize(
    "bounds", [[0, 30, 10, 40], [-5, 20, 40], [0, 20, 10**6], [10**12, -(10**12), 3], [40, 0], [2**62, 2**62]]
)
def test_a_malformed_cu_seqlens_stays_in_bounds(bounds: list[int]) -> None:
    """It is read as its running maximum within ``[0, T]``."""
    call = make_call(40, cu_seqlens=bounds, initial_state=True)
    read_as = call["cu_seqlens"].clamp(0, 40).cummax(0).values
    assert output_error(run(call), reference({**call, "cu_seqlens": read_as})) < 2e-6
    loose = {n: call[n].requires_grad_() for n in TOKENS}
    run({**call, **loose})[0].sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in loose.values())
    with torch.no_grad():
        assert torch.isfinite(chunk_kda(**call, return_intermediate_states=True)[2]).all()


@pytest.mark.parametrize("cu_seqlens", [None, [0, 33, 64]])
@pytest.mark.parametrize("heads", [1, 2])
def test_inputs_are_left_as_they_are(heads: int, cu_seqlens: list[int] | None) -> None:
    """One head of one row lies in memory as its chunks do: no copy is needed to read it, but one to work on it."""
    call = make_call(64, H=heads, HV=heads, gate="precomputed", beta="raw", initial_state=True, cu_seqlens=cu_seqlens)
    leaves = requiring_grad(call)
    before = {name: call[name].clone() for name in (*TOKENS, "initial_state")}
    o, state = run(leaves)
    (o.sum() + state.sum()).backward()
    recurrent_kda(**call)
    for name, x in before.items():
        assert torch.equal(call[name], x) and torch.equal(leaves[name], x), name
