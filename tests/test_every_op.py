"""What holds of every op alike: sequences do not reach each other, memory is written before it is read and owned by who
gets it, rows of no sequence are zero, and the cost does not grow with the entries of ``cu_seqlens``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_op import BATCHED, OPS, SUMMED, Poison, Results, Work, inside_ops, with_cotangents
from helpers import DIFFERENTIABLE, TOKENS, Call, error, make_call, paged, requiring_grad
from torch import Tensor

from flashkda_ops import chunk_kda, portable, recurrent_kda, recurrent_kda_paged, shared_chunks
from flashkda_ops.chunks import Inputs
from flashkda_ops.shared_chunks import SharedLayout

LENGTHS = (5, 0, 3, 40, 1, 1, 20, 64, 2, 7)
MIXED = [0, *itertools.accumulate(LENGTHS)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"T": 37, "B": 3},
    "dense tokens": {"T": 1, "B": 3},
    "packed, many": {"T": 150, "cu_seqlens": MIXED},
    "packed, many, begins late and is padded": {"T": 170, "cu_seqlens": [x + 9 for x in MIXED]},
    "packed tokens": {"T": 40, "cu_seqlens": list(range(37))},
    "packed, few": {"T": 300, "cu_seqlens": [3, 90, 90, 95, 280]},
    "malformed": {"T": 90, "cu_seqlens": [-7, 30, 10, 35, 10**6, 20, 80]},
}


def call_of(layout: str, **options: Any) -> Call:
    options = {"gate": "bounded", "initial_state": True, **LAYOUTS[layout], **options}
    return with_cotangents(make_call(**options))


def spans(call: Call) -> list[tuple[int, int, int]]:
    """Row of the batch, first token and end of each sequence, as the ops read ``cu_seqlens``."""
    B, T = call["q"].shape[:2]
    if call.get("cu_seqlens") is None:
        return [(b, 0, T) for b in range(B)]
    return [(0, a, b) for a, b in itertools.pairwise(call["cu_seqlens"].clamp(0, T).cummax(0).values.tolist())]


def fill(call: Call, name: str, n: int, value: float) -> None:
    """Sequence ``n`` of an argument with some numbers that are not finite."""
    b, start, end = spans(call)[n]
    x = call[name][b, start:end] if name in BATCHED else call[name][n]
    x.view(-1)[::3] = value


def padding(call: Call) -> Tensor:
    """``[B, T]``: tokens of no sequence."""
    mask = torch.ones(call["q"].shape[:2], dtype=torch.bool)
    for b, start, end in spans(call):
        mask[b, start:end] = False
    return mask


def fill_padding(call: Call) -> None:
    for name in (*TOKENS, "do"):
        call[name][padding(call)] = torch.nan


def copied(call: Call) -> Call:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in call.items()}


def without(results: Results, call: Call, n: int) -> dict[str, Tensor]:
    """What is not sequence ``n``'s: all other tokens and states."""
    b, start, end = spans(call)[n]
    tokens = torch.ones(call["q"].shape[:2], dtype=torch.bool)
    tokens[b, start:end] = False
    others = torch.arange(len(spans(call))) != n
    rest = {}
    for name, x in results.items():
        if name == "states between" and call.get("cu_seqlens") is not None:
            owners = [m for m, (_, a, e) in enumerate(spans(call)) for _ in range(a, e, 32)]
            keep = torch.tensor([m != n for m in owners] + [True] * (x.shape[1] - len(owners)), dtype=torch.bool)
            rest[name] = x[:, keep]
        elif name == "states between":
            rest[name] = x[others]
        elif name in BATCHED:
            rest[name] = x[tokens]
        elif name not in SUMMED:
            rest[name] = x[others]
    return rest


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Sequences do not reach each other
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_what_is_not_finite_stays_in_its_sequence(name: str, layout: str, value: float) -> None:
    call = call_of(layout)
    fill_padding(call)
    clean = OPS[name](copied(call))
    assert all(torch.isfinite(x).all() for label, x in clean.items() if label != "written")
    arguments, N = (*TOKENS, "initial_state", "do", "dht"), len(spans(call))
    all_at_once = [(n, arguments) for n in range(0, N, max(1, N // 5))]
    one_by_one = [(3 * i % N, (argument,)) for i, argument in enumerate(arguments)]
    for n, names in (*all_at_once, *one_by_one):
        spoiled = copied(call)
        for argument in names:
            fill(spoiled, argument, n, value)
        expected = without(clean, call, n)
        for label, x in without(OPS[name](spoiled), call, n).items():
            assert torch.equal(bits(x), bits(expected[label])), (label, n, names)


@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
@pytest.mark.parametrize("layout", ["dense", "packed, many", "packed, few"])
@pytest.mark.parametrize("name", OPS)
def test_nan_shows_in_what_comes_behind_it(name: str, layout: str, gate: str) -> None:
    """Whatever holds NaN in one token or in the state before, each later output of the sequence does, and its state."""
    n = 3 if layout != "dense" else 1
    for argument in ("k", "v", "g", "beta", "initial_state"):
        call = call_of(layout, gate=gate)
        b, start, end = spans(call)[n]
        at = (start + end) // 2
        if argument == "initial_state":
            call[argument][n] = torch.nan
            at = start
        else:
            call[argument][b, at] = torch.nan
        results = OPS[name](call)
        if "o" in results:
            assert results["o"][b, at:end].isnan().all(), argument
        for label in ("final_state", "pool"):
            if label in results and "slot" not in name:
                assert results[label][n].isnan().all(), (label, argument)
        if "M" in results and argument in ("k", "g", "beta"):
            assert results["M"][n].isnan().any(), argument
        if "dq" in results:
            assert results["dq"][b, at:end].isnan().any(), argument


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "cu_seqlens" in LAYOUTS[layout]])
def test_rows_of_no_sequence_are_zero(layout: str, name: str) -> None:
    call = call_of(layout)
    fill_padding(call)
    for label, x in OPS[name](call).items():
        if label in BATCHED and label != "states between":
            assert not x[padding(call)].any(), label


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_no_memory_is_read_before_it_is_written(name: str, layout: str) -> None:
    for options in ({}, {"gate": "unbounded", "state_v_first": True, "dtype": torch.bfloat16, "H": 4}):
        call = call_of(layout, **options)
        fill_padding(call)
        expected = OPS[name](copied(call))
        for value in (torch.nan, 1e30, -1.0):
            mode = Poison(value)
            with inside_ops(mode):
                results = OPS[name](copied(call))
            assert mode.poisoned > 0
            for label, x in results.items():
                assert torch.equal(x.contiguous().view(torch.uint8), expected[label].contiguous().view(torch.uint8)), (
                    label
                )


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_results_own_their_memory(name: str, layout: str, dtype: torch.dtype, state_v_first: bool) -> None:
    for heads in (1, 2):
        call = call_of(layout, dtype=dtype, state_v_first=state_v_first, H=heads, HV=heads)
        results = {label: x for label, x in OPS[name](call).items() if label not in ("pool", "written")}
        for label, x in results.items():
            assert x._base is None and x.is_contiguous(), label
        addresses = [
            x.untyped_storage().data_ptr() for x in (*results.values(), *call.values()) if isinstance(x, Tensor)
        ]
        assert len(set(addresses)) == len(addresses)


def by_the_op(call: Call) -> tuple[Tensor, Tensor]:
    return torch.ops.flashkda.chunk_kda(**call, output_final_state=True)[:2]


def by_the_function(call: Call) -> tuple[Tensor, Tensor]:
    return chunk_kda(**call, output_final_state=True)


def by_maps(call: Call) -> tuple[Tensor, Tensor]:
    return torch.ops.flashkda.chunk_kda_transition(
        **{name: x for name, x in call.items() if name not in ("q", "initial_state")}
    )


@pytest.mark.parametrize("in_place", [lambda x: x.mul_(2), lambda x: x.add_(x.detach()), lambda x: x.zero_()])
@pytest.mark.parametrize("function", [by_the_function, by_the_op, by_maps])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "layout",
    [
        {"T": 1},
        {"T": 31},
        {"T": 32},
        {"T": 64, "B": 2},
        {"T": 64, "cu_seqlens": [0, 9, 64]},
        {"T": 200, "cu_seqlens": [0, 200]},
    ],
    ids=str,
)
def test_results_may_be_changed_in_place_in_training(
    layout: dict[str, Any], dtype: torch.dtype, function: Callable[[Call], tuple[Tensor, Tensor]], in_place: Any
) -> None:
    gradients = []
    for change in (in_place, lambda x: in_place(x.clone())):
        call = requiring_grad(make_call(initial_state=True, dtype=dtype, **layout))
        sum(change(x).square().sum() for x in function(call)).backward()
        gradients.append([call[name].grad for name in DIFFERENTIABLE if call[name].grad is not None])
    assert len(gradients[0]) >= 6
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_may_be_changed_in_place_without_gradients(layout: str) -> None:
    call = {name: x for name, x in call_of(layout).items() if name not in ("do", "dht")}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for function, options in (
                (chunk_kda, {"return_intermediate_states": True}), (chunk_kda, {}), (recurrent_kda, {}),
            ):  # fmt: skip
                before = copied(call)
                results = function(**call, output_final_state=True, **options)
                kept = [x.clone() for x in results]
                for i, x in enumerate(results):
                    x.fill_(i)
                assert all(bool((x == i).all()) for i, x in enumerate(results))
                assert all(torch.equal(x, call[name]) for name, x in before.items() if isinstance(x, Tensor))
                again = function(**call, output_final_state=True, **options)
                assert all(torch.equal(x, y) for x, y in zip(again, kept, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------

TOKENS_OF_COST = 1024
BOUNDS = {
    "one": [0, TOKENS_OF_COST],
    "one and many empty": [0, *[TOKENS_OF_COST] * (TOKENS_OF_COST - 1)],
    "many empty ahead of one": [*[0] * (TOKENS_OF_COST - 1), TOKENS_OF_COST],
    "tokens": list(range(TOKENS_OF_COST + 1)),
    "of 8": list(range(0, TOKENS_OF_COST + 1, 8)),
    "of 64": list(range(0, TOKENS_OF_COST + 1, 64)),
}


def work(function: Callable[[Call], Any], call: Call) -> Work:
    with inside_ops(Work()) as mode:
        function(call)
    return mode


def cost_call(K: int, V: int, **options: Any) -> Call:
    return with_cotangents(make_call(TOKENS_OF_COST, H=2, HV=2, K=K, V=V, initial_state=True, **options))


def without_states(name: str) -> Callable[[Call], Any]:
    if name == "backward":
        return lambda call: OPS[name]({**call, "initial_state": None, "dht": None})
    return lambda call: chunk_kda(**{n: x for n, x in call.items() if n not in ("initial_state", "do", "dht")})


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(("K", "V"), [(16, 8), (64, 64)])
@pytest.mark.parametrize("name", ["chunk_kda", "backward"])
def test_tokens_cost_the_same_in_any_number_of_sequences(name: str, K: int, V: int, bounds: str) -> None:
    dense, packed = (work(without_states(name), cost_call(K, V, cu_seqlens=x)) for x in (None, BOUNDS[bounds]))
    assert packed.operators < 2.5 * dense.operators
    assert packed.elements < 2 * dense.elements
    assert packed.flops < 2 * dense.flops


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("name", [name for name in OPS if "batch invariant" not in name and "slot" not in name])
def test_states_of_many_sequences_cost_what_it_takes_to_write_them(name: str, bounds: str) -> None:
    """Some tens of passes over all of them beside the tokens, whose cost does not grow."""
    dense = work(OPS[name], cost_call(16, 8))
    packed = work(OPS[name], cost_call(16, 8, cu_seqlens=BOUNDS[bounds]))
    states = (len(BOUNDS[bounds]) - 1) * 2 * 16 * 8
    assert packed.operators < 4 * dense.operators
    assert packed.elements < 2.5 * dense.elements + 60 * states
    assert packed.flops < 6 * dense.flops


@pytest.mark.parametrize("slots", [1, 4])
def test_decode_with_a_slot_a_token_takes_as_many_steps_as_there_are_slots(slots: int) -> None:
    N = TOKENS_OF_COST // slots
    counted = []
    for layout in ({"B": N, "T": slots}, {"T": N * slots, "cu_seqlens": list(range(0, N * slots + 1, slots))}):
        call = make_call(**layout, H=2, HV=2, K=16, V=8)
        pool, indices = torch.zeros(N * slots, 2, 16, 8), torch.arange(N * slots).view(N, slots)
        counted.append(work(lambda call: recurrent_kda_paged(**call), paged(call, pool, indices)))
    dense, packed = counted
    assert packed.operators < dense.operators + 600  # for the tokens that may be beyond the slots of their sequence
    assert packed.elements < 4 * dense.elements


def test_the_layout_follows_from_shapes_alone() -> None:
    q = torch.zeros(1, 1024, 2, 16)
    assert isinstance(portable._layout(q, torch.zeros(17, dtype=torch.int64)), SharedLayout)
    assert not isinstance(portable._layout(q, torch.zeros(16, dtype=torch.int64)), SharedLayout)
    assert not isinstance(portable._layout(q, torch.zeros(1000, dtype=torch.int64), batch_invariant=True), SharedLayout)


def test_a_call_of_many_runs_of_chunks_is_right() -> None:
    """Where states are large, runs are short: sequences begin, end and go on in each."""
    cuts = torch.randint(0, 700, (100,), generator=torch.Generator().manual_seed(0)).sort().values.tolist()
    call = with_cotangents(make_call(700, H=8, HV=8, K=64, V=64, initial_state=True, cu_seqlens=[0, *cuts, 690]))
    layout = portable._layout(call["q"], call["cu_seqlens"])
    x = Inputs(*(call[name] for name in TOKENS), None, None)
    assert isinstance(layout, SharedLayout) and len(shared_chunks._runs(layout, x, states=True)) > 5
    exact = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in call.items()}
    for name in ("chunk_kda", "chunk_kda, states between", "backward", "prefill, checkpoints", "transition"):
        expected = OPS[name](exact)
        for label, x in OPS[name](call).items():
            assert error(x.nan_to_num(), expected[label].nan_to_num()) < 1e-5, (name, label)
