"""What calls have to do with each other: parts of a sequence, its neighbours, its future, its size, its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import strategies
import torch
from helpers import TOKENS, Call, cotangents, requiring_grad, rows
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import DEVICES, Case, build, exact, same_bits, tolerance
from torch import Tensor

from flashkda_ops import chunk_kda, recurrent_kda_paged

pytestmark = pytest.mark.fuzz
on_every_device = pytest.mark.parametrize("device", DEVICES)
Pair = tuple[Tensor, Tensor]

VALUES = ("random", "zeros", "one key", "beta at its ends")
WIDTHS = {"cpu": [(4, 4), (16, 8), (64, 40), (48, 64), (128, 2), (128, 128)], "cuda": strategies.KERNEL_WIDTHS}
"""Where bits are compared. Products of odd sizes MKL rounds by where in memory they lie, and those of one column torch
takes for those of a vector where they are alone."""

CHUNK = 64
"""Sequences that are cut at its multiples are cut between chunks, on every path."""


@torch.no_grad()
def run(call: Call) -> Pair:
    o, state = chunk_kda(**call, output_final_state=True)
    return o, state


def has_bits_of_its_own(call: Call) -> bool:
    """Whether what a sequence or a head is computed beside changes no bit: by the kernels, and on a CPU, but not where
    cuBLAS chooses an algorithm by how many products there are."""
    return not call["q"].is_cuda or strategies.served(call)


def all_same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def assert_near(results: Pair, others: Pair, call: Call, case: Case) -> None:
    """Two ways to the same results are as near to each other as both are to the recurrence."""
    start = call.get("initial_state")
    o, state = (x if i == 0 or case.state_v_first else x.mT for i, x in enumerate(results))
    o_other, state_other = (x if i == 0 or case.state_v_first else x.mT for i, x in enumerate(others))
    is_served = strategies.served(call)
    start = None if start is None else start if case.state_v_first else start.mT
    expected = exact(call, case.spans, start, clamped=is_served)
    for n, (row, begin, end) in enumerate(case.spans):
        expected.o[n, : end - begin] = o_other[row, begin:end].double()
    allowed = tolerance(case, call, is_served)
    assert strategies.worst_output(o, expected, case.spans) < 2 * allowed.o
    states = state_other.double().unsqueeze(1)
    assert strategies.worst_state(state.unsqueeze(1), states, expected.state_sizes) < 2 * allowed.state


def sequence(call: Call, case: Case, n: int) -> Call:
    """Sequence ``n`` of a call as a dense batch of one."""
    row, start, end = case.spans[n]
    single = {**call, **{name: call[name][row : row + 1, start:end] for name in TOKENS}}
    single.pop("cu_seqlens", None)
    if "initial_state" in call:
        single["initial_state"] = call["initial_state"][n : n + 1]
    return single


@on_every_device
@given(data=st.data())
def test_a_sequence_may_be_split_anywhere_and_its_states_chained(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, packed=False, values=VALUES, widths=WIDTHS[device]))
    cut = data.draw(st.one_of(st.sampled_from([t for t in range(0, case.T + 1, CHUNK)]), st.integers(0, case.T)))
    call = build(case, device)
    whole = run(call)
    o_first, state = run(rows(call, 0, cut))
    o_second, state = run(rows(call, cut) | {"initial_state": state})
    chained = torch.cat((o_first, o_second), 1), state
    assert_near(whole, chained, call, case)
    if case.batch_invariant and cut % CHUNK == 0 and has_bits_of_its_own(call):
        assert all_same_bits(whole, chained)


@on_every_device
@given(data=st.data())
def test_sequences_in_another_order_have_the_same_bits(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, values=VALUES, widths=WIDTHS[device]))
    case = replace(case, batch_invariant=True)
    call, spans = build(case, device), case.spans
    assume(has_bits_of_its_own(call))
    order = data.draw(st.permutations(range(len(spans))))
    moved = dict(call)
    for name in TOKENS:
        parts = strategies.of_sequences(call[name], spans)
        if case.cu_seqlens is None:
            moved[name] = call[name][list(order)]
        else:
            moved[name] = torch.cat([*(parts[n] for n in order), call[name][0, spans[-1][2] :]]).unsqueeze(0)
    if case.cu_seqlens is not None:
        ends = torch.tensor([0, *(case.lengths[n] for n in order)]).cumsum(0)
        moved["cu_seqlens"] = ends.to(call["cu_seqlens"])
    if "initial_state" in call:
        moved["initial_state"] = call["initial_state"][list(order)]
    (o, state), (o_moved, state_moved) = run(call), run(moved)
    assert same_bits(state[list(order)], state_moved)
    if case.cu_seqlens is None:
        assert same_bits(o[list(order)], o_moved)
    else:
        parts = strategies.of_sequences(o, spans)
        expected = torch.cat([*(parts[n] for n in order), o[0, spans[-1][2] :]])
        assert same_bits(expected, o_moved[0])


@on_every_device
@given(data=st.data())
def test_sequences_together_have_the_bits_they_have_alone(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, values=VALUES, long=False, widths=WIDTHS[device]))
    case = replace(case, batch_invariant=True, initial_state=True)
    call = build(case, device)
    assume(has_bits_of_its_own(call))
    do, dht = cotangents(call, case.seed)
    names = (*TOKENS, "initial_state")

    def gradients(call: Call, do: Tensor, dht: Tensor) -> list[Tensor]:
        leaves = requiring_grad(call, names)
        results = chunk_kda(**leaves, output_final_state=True)
        return [*results, *torch.autograd.grad(results, [leaves[name] for name in names], (do, dht))]

    o, state, *of_tokens, of_state = gradients(call, do, dht)
    for n, (row, start, end) in enumerate(case.spans):
        alone = gradients(sequence(call, case, n), do[row : row + 1, start:end], dht[n : n + 1])
        together = [x[row : row + 1, start:end] for x in (o, *of_tokens)]
        together = [together[0], state[n : n + 1], *together[1:], of_state[n : n + 1]]
        assert all_same_bits(alone, together), n


@on_every_device
@given(data=st.data())
def test_outputs_double_with_values_and_states(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, hostile=True, values=VALUES))
    call = build(case, device)
    twice = {**call, **{name: call[name] * 2 for name in ("v", "initial_state") if name in call}}
    (o, state), (o_twice, state_twice) = run(call), run(twice)
    for x, doubled in ((o, o_twice), (state, state_twice)):
        # What is next to nothing has been rounded to subnormal numbers on its way, which are not as fine.
        least = 2.0**-13 if x.dtype == torch.float16 else 1e-25
        is_normal = x.abs() >= least
        assert torch.equal(doubled[is_normal], x[is_normal] * 2)
        rest = (doubled.double() - x.double() * 2)[~is_normal].abs()
        assert rest.le(torch.finfo(x.dtype).eps * least).all()


def of_group(call: Call, case: Case, group: int) -> Call:
    """The call on the heads of one query."""
    size = case.HV // case.H
    heads = slice(group * size, (group + 1) * size)
    part = {**call, **{name: call[name][:, :, group : group + 1] for name in "qk"}}
    part |= {name: call[name][:, :, heads] for name in ("v", "g", "beta")}
    if "A_log" in call:
        part["A_log"] = call["A_log"][heads]
    if "dt_bias" in call:
        part["dt_bias"] = call["dt_bias"].view(case.HV, case.K)[heads]
    if "initial_state" in call:
        part["initial_state"] = call["initial_state"][:, heads]
    return part


@on_every_device
@given(data=st.data())
def test_a_head_does_not_depend_on_its_neighbours(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, hostile=True, values=VALUES, widths=WIDTHS[device]))
    case = replace(case, expanded=None)
    if device == "cpu":
        case = replace(case, H=max(case.H, 2), HV=max(case.H, 2) * (case.HV // case.H))
    call = build(case, device)
    group, size = data.draw(st.integers(0, case.H - 1)), case.HV // case.H
    heads = slice(group * size, (group + 1) * size)
    other = build(replace(case, seed=case.seed + 7, speed=data.draw(st.sampled_from(("slow", "fast")))), device)
    for name in ("q", "k", "v", "g", "beta"):
        mine = slice(group, group + 1) if name in "qk" else heads
        other[name] = other[name].clone()
        other[name][:, :, mine] = call[name][:, :, mine]
    for name in ("A_log", "dt_bias", "initial_state"):
        if name in call:
            other[name] = other[name].clone().contiguous()
            where = (slice(None), heads) if name == "initial_state" else (heads,)
            view = other[name].view(case.HV, -1) if name == "dt_bias" else other[name]
            view[where] = call[name].reshape(view.shape)[where]
    (o, state), (o_other, state_other) = run(call), run(other)
    assert same_bits(o[:, :, heads], o_other[:, :, heads]) and same_bits(state[:, heads], state_other[:, heads])
    if case.batch_invariant and has_bits_of_its_own(call):
        assert all_same_bits((o[:, :, heads], state[:, heads]), run(of_group(call, case, group)))


@on_every_device
@given(data=st.data())
def test_outputs_do_not_depend_on_the_future(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, packed=False, values=VALUES))
    case = replace(case, batch_invariant=True, expanded=None)
    now = data.draw(st.integers(0, case.T))
    call, other = build(case, device), build(replace(case, seed=case.seed + 7), device)
    changed = {**call, **{name: torch.cat((call[name][:, :now], other[name][:, now:]), 1) for name in TOKENS}}
    # A chunk of the kernels is one block of products, whose parts may have factors in common.
    kept = now // 16 * 16 if strategies.served(call) else now
    assert same_bits(run(call)[0][:, :kept], run(changed)[0][:, :kept])
    assert_near_until(now, call, changed, case)


def assert_near_until(now: int, call: Call, changed: Call, case: Case) -> None:
    """And nowhere by more than rounding."""
    before = replace(case, T=now)
    results = []
    for x in (call, changed):
        o, _ = run(x)
        results.append(o[:, :now])
    cut = rows(call, 0, now)
    _, state = run(cut)
    assert_near((results[0], state), (results[1], state), cut, before)


@on_every_device
@given(data=st.data())
def test_decode_goes_on_as_prefill_does(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, packed=False, values=VALUES, most_tokens=24, long=False))
    case = replace(case, initial_state=True, batch_invariant=False)
    call = build(case, device)
    pool = call["initial_state"].clone(memory_format=torch.contiguous_format)
    step: dict[str, Any] = {name: x for name, x in call.items() if name not in ("initial_state", "batch_invariant")}
    step |= {"state_pool": pool, "state_indices": torch.arange(case.B, device=device)}
    prompt = data.draw(st.integers(0, case.T))
    o, state = run(rows(call, 0, prompt))
    pool.copy_(state)
    outputs = [o]
    for t in range(prompt, case.T):
        outputs.append(recurrent_kda_paged(**rows(step, t, t + 1)))
    assert_near((torch.cat(outputs, 1), pool), run(call), call, case)
