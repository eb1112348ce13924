"""States in a pool: prefill, decode and speculative decoding update the rows they name and no other byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BETAS, GATES, TOKENS, Call, error, make_call, output_error, paged, reference, rows
from torch import Tensor

from flashkda_ops import chunk_kda_paged, recurrent_kda_paged

ROWS = 9
FUNCTIONS = [chunk_kda_paged, recurrent_kda_paged]
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"T": 37, "B": 4},
    "one token": {"T": 1, "B": 4},
    "packed": {"T": 50, "cu_seqlens": [0, 3, 4, 36, 45]},
    "packed tokens": {"T": 4, "cu_seqlens": [0, 1, 2, 3, 4]},
}
SLOTS = [6, 0, 8, 3]


def make_pool(call: Call, dtype: torch.dtype | None = None, layout: str = "dense") -> Tensor:
    """A pool of NaN rows; with ``layout="strided"`` a part of wider rows."""
    _, _, HV, V = call["v"].shape
    K, dtype = call["q"].shape[-1], dtype or torch.promote_types(call["q"].dtype, torch.float32)
    shape = (HV, V, K) if call.get("state_v_first") else (HV, K, V)
    if layout == "dense":
        return torch.full((ROWS, *shape), torch.nan, dtype=dtype)
    wide = torch.full((ROWS, 2, *shape), torch.nan, dtype=dtype)
    return wide[:, 1]


def with_states(call: Call, slots: list[int], **pool_options: Any) -> tuple[Call, Tensor, Tensor]:
    """A call on a pool that holds its initial states, that pool, and the slots. Other rows are NaN."""
    pool, indices = make_pool(call, **pool_options), torch.tensor(slots, dtype=torch.int64)
    live = (indices >= 0) & (indices < ROWS)
    pool[indices[live]] = call["initial_state"][live].to(pool.dtype)
    return paged(call, pool, indices), pool, indices


def assert_only_changed(pool: Tensor, before: Tensor, slots: list[int]) -> None:
    others = [row for row in range(ROWS) if row not in slots]
    assert torch.equal(pool[others].view(torch.uint8), before[others].view(torch.uint8))


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_named_rows_follow_the_recurrence(function: Any, gate: str, layout: str, state_v_first: bool) -> None:
    call = make_call(**LAYOUTS[layout], gate=gate, initial_state=True, state_v_first=state_v_first)
    on_pool, pool, slots = with_states(call, SLOTS)
    before = pool.clone()
    o = function(**on_pool)
    assert o.is_contiguous()
    assert output_error((o, pool[slots]), reference(call)) < 2e-6
    assert_only_changed(pool, before, SLOTS)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_options_are_those_of_the_recurrence(function: Any, l2norm: bool, beta: str) -> None:
    call = make_call(3, B=4, H=1, HV=3, K=7, V=5, beta=beta, l2norm=l2norm, initial_state=True)
    call["scale"] = 0.7
    on_pool, pool, slots = with_states(call, SLOTS)
    assert output_error((function(**on_pool), pool[slots]), reference(call)) < 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("slots", [[6, -1, 8, ROWS], [-1, 10**9, 2, -(10**9)], [-1] * 4])
def test_slots_outside_the_pool_are_padding(slots: list[int], function: Any, layout: str) -> None:
    call = make_call(**LAYOUTS[layout], initial_state=True)
    live = [0 <= slot < ROWS for slot in slots]
    expected_o, expected_state = reference(call)
    bounds = LAYOUTS[layout].get("cu_seqlens")
    for n, is_live in enumerate(live):
        where = (0, slice(bounds[n], bounds[n + 1])) if bounds else (n,)
        if not is_live:
            expected_o[where] = 0
            for name in TOKENS:
                call[name][where] = torch.nan
    on_pool, pool, indices = with_states(call, slots)
    before = pool.clone()
    o = function(**on_pool)
    assert error(o, expected_o) < 2e-6
    assert torch.equal(o == 0, expected_o == 0)
    assert error(pool[indices[live]], expected_state[live]) < 2e-6
    assert_only_changed(pool, before, slots)


@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_pool_may_be_bf16_and_strided(
    function: Any, index_dtype: torch.dtype, dtype: torch.dtype, layout: str
) -> None:
    call = make_call(4, B=4, dtype=torch.bfloat16, initial_state=True)
    call["initial_state"] = call["initial_state"].to(dtype)
    on_pool, pool, slots = with_states(call, SLOTS, dtype=dtype, layout=layout)
    whole = pool._base if layout == "strided" else pool
    before = whole.clone()
    o = function(**{**on_pool, "state_indices": slots.to(index_dtype)})
    expected = reference(call)
    assert error(o, expected[0], heads=2) < 6e-3
    assert error(pool[slots], expected[1], heads=1) < (2e-6 if dtype == torch.float32 else 4e-3)
    if layout == "strided":
        assert torch.equal(whole[:, 0].view(torch.uint8), before[:, 0].view(torch.uint8))


def test_states_in_a_bf16_pool_are_computed_in_fp32() -> None:
    """A decay too slow for bf16 is not lost between the tokens of a call."""
    call = make_call(64, B=1, H=1, HV=1, gate="precomputed", beta="raw", initial_state=True)
    call["g"] = torch.full_like(call["g"], -1e-3)
    call["beta"] = torch.zeros_like(call["beta"])
    for function in FUNCTIONS:
        on_pool, pool, slots = with_states(call, [2], dtype=torch.bfloat16)
        start = pool[slots].double()
        function(**on_pool)
        torch.testing.assert_close(pool[slots].double(), start * torch.tensor(-0.064).exp(), rtol=4e-3, atol=0)


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_sequence_without_an_initial_state_starts_from_zero(layout: str) -> None:
    call = make_call(**LAYOUTS[layout], initial_state=True)
    has = torch.tensor([True, False, False, True])
    on_pool, pool, slots = with_states(call, SLOTS)
    pool[slots[~has]] = torch.nan
    o = chunk_kda_paged(**on_pool, has_initial_state=has)
    call["initial_state"] = torch.where(has[:, None, None, None], call["initial_state"], 0.0)
    assert output_error((o, pool[slots]), reference(call)) < 2e-6


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bounds", [[0, 0, 5, 5, 9], [0, 0, 0, 0, 0]])
def test_an_empty_sequence_leaves_its_row(function: Any, bounds: list[int]) -> None:
    call = make_call(9, cu_seqlens=bounds, initial_state=True)
    on_pool, pool, slots = with_states(call, SLOTS)
    if function is chunk_kda_paged:
        on_pool["has_initial_state"] = torch.zeros(4, dtype=torch.bool)
    empty = call["cu_seqlens"].diff() == 0
    function(**on_pool)
    assert torch.equal(pool[slots[empty]], call["initial_state"][empty])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_tokens_no_rows_and_no_sequences_are_fine(function: Any) -> None:
    for call in (make_call(0, B=4, initial_state=True), make_call(3, B=0, initial_state=True)):
        on_pool, pool, _ = with_states(call, SLOTS[: call["q"].shape[0]])
        before = pool.clone()
        assert function(**on_pool).shape == call["v"].shape
        assert_only_changed(pool, before, [])
    call = make_call(3, B=4)
    o = function(**paged(call, make_pool(call)[:0], torch.tensor(SLOTS)))
    assert not o.any()


@pytest.mark.parametrize("bounds", [[0, 30, 10, 40, 40], [-5, 20, 40, 10**9, 3], [10**12, -(10**12), 3, 3, 9]])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_malformed_cu_seqlens_stays_in_bounds(function: Any, bounds: list[int]) -> None:
    call = make_call(40, cu_seqlens=bounds, initial_state=True)
    on_pool, pool, slots = with_states(call, SLOTS)
    before = pool.clone()
    o = function(**on_pool)
    assert torch.isfinite(o).all() and torch.isfinite(pool[slots]).all()
    assert_only_changed(pool, before, SLOTS)


@pytest.mark.parametrize("state_v_first", [False, True])
def test_prefill_then_decode_is_one_prefill(state_v_first: bool) -> None:
    call = make_call(50, B=4, initial_state=True, state_v_first=state_v_first)
    on_pool, pool, slots = with_states(call, SLOTS)
    parts = [chunk_kda_paged(**rows(on_pool, 0, 40)), recurrent_kda_paged(**rows(on_pool, 40, 44))]
    parts += [recurrent_kda_paged(**rows(on_pool, t, t + 1)) for t in range(44, 50)]
    assert output_error((torch.cat(parts, 1), pool[slots]), reference(call)) < 2e-6


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: states within a sequence, to rows of the pool
# ---------------------------------------------------------------------------------------------------------------------

CHECKPOINTS = [[1, 37, 40, 7], [40, 2, 0, 1], [33, 32, 31, 90], [-1, 5, 41, 5]]


def with_checkpoints(call: Call, offsets: list[list[int]], has: list[bool] | None = None) -> tuple[Call, Tensor]:
    """The call on a pool of NaN but for the initial states, in the rows 0 to 3 of 30; where the checkpoints go."""
    N, width = len(offsets), len(offsets[0])
    pool = torch.full((30, *call["initial_state"].shape[1:]), torch.nan)
    pool[:N] = call["initial_state"]
    slots = torch.randperm(30 - N, generator=torch.Generator().manual_seed(0))[: N * width].view(N, width) + N
    checkpoints = {"checkpoint_offsets": torch.tensor(offsets), "checkpoint_indices": slots}
    if has is not None:
        checkpoints["has_initial_state"] = torch.tensor(has)
    return paged(call, pool, torch.arange(N), **checkpoints), slots


def state_after(call: Call, n: int, tokens: int) -> Tensor:
    """The state of sequence ``n`` of a call after some of its tokens."""
    bounds = call.get("cu_seqlens")
    row, start = (n, 0) if bounds is None else (0, int(bounds[n]))
    single = {name: call[name][row : row + 1, start : start + tokens] for name in TOKENS}
    return reference({**call, **single, "cu_seqlens": None, "initial_state": call["initial_state"][n : n + 1]})[1][0]


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("layout", [{"T": 40, "B": 4}, {"T": 90, "cu_seqlens": [0, 40, 42, 42, 83]}], ids=str)
def test_states_at_the_offsets_asked_for_go_to_their_rows(layout: dict[str, Any], state_v_first: bool) -> None:
    call = make_call(**layout, initial_state=True, state_v_first=state_v_first)
    has = [True, False, True, True]
    on_pool, slots = with_checkpoints(call, CHECKPOINTS, has)
    lengths = [40] * 4 if "B" in layout else call["cu_seqlens"].diff().tolist()
    call["initial_state"] = torch.where(torch.tensor(has)[:, None, None, None], call["initial_state"], 0.0)
    o, pool = chunk_kda_paged(**on_pool), on_pool["state_pool"]
    expected_o, expected_state = reference(call)
    assert error(o, expected_o) < 2e-6 and o.is_contiguous()
    written = 0
    for n, length in enumerate(lengths):
        if length:
            assert error(pool[n], expected_state[n]) < 2e-6
        for slot, offset in zip(slots[n].tolist(), CHECKPOINTS[n], strict=True):
            if 1 <= offset <= length:
                assert error(pool[slot], state_after(call, n, offset)) < 2e-6
                written += 1
            else:
                assert pool[slot].isnan().all()
    assert int(pool.flatten(1).isnan().all(1).sum()) == 26 - written


def test_checkpoints_of_padding_and_outside_the_pool_are_not_written() -> None:
    call = make_call(9, B=3, initial_state=True)
    on_pool, slots = with_checkpoints(call, [[3, 6]] * 3)
    on_pool["state_indices"] = torch.tensor([0, -1, 2])
    slots[0, 1], slots[2, 0] = -1, 30
    o, pool = chunk_kda_paged(**on_pool), on_pool["state_pool"]
    assert not o[1].any()
    for slot, n, offset in ((slots[0, 0], 0, 3), (slots[2, 1], 2, 6)):
        assert error(pool[slot], state_after(call, n, offset)) < 2e-6
    assert int(pool.flatten(1).isnan().all(1).sum()) == 30 - 3 - 2


def test_a_sequence_goes_on_from_a_checkpoint_as_if_never_stopped() -> None:
    call = make_call(50, B=2, initial_state=True)
    on_pool, slots = with_checkpoints(call, [[16], [16]])
    o, pool = chunk_kda_paged(**on_pool), on_pool["state_pool"]
    resumed = chunk_kda_paged(**paged(rows(call, 16), pool, slots.flatten()))
    assert error(resumed, o[:, 16:].double()) < 2e-6
    assert error(pool[slots.flatten()], pool[:2].double()) < 2e-6


@pytest.mark.parametrize("bounds", [[0, 30, 10, 40, 40], [-5, 20, 40, 10**9, 3], [10**12, -(10**12), 3, 3, 9]])
def test_malformed_bounds_with_checkpoints_stay_in_bounds(bounds: list[int]) -> None:
    call = make_call(40, cu_seqlens=bounds, initial_state=True)
    on_pool, slots = with_checkpoints(call, [[10**9, -(10**9)], [1, 2], [3, 40], [0, 5]])
    o, pool = chunk_kda_paged(**on_pool), on_pool["state_pool"]
    assert torch.isfinite(o).all() and torch.isfinite(pool[:4]).all()
    others = torch.ones(30, dtype=torch.bool)
    others[:4] = others[slots] = False
    assert pool[others].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Speculative decoding: a slot for the state after each token
# ---------------------------------------------------------------------------------------------------------------------

DRAFTS = 3


def decode(call: Call, state: Tensor) -> tuple[Tensor, Tensor]:
    """Plain decode, a token a call: outputs, and the state after each token ``[N, T, ...]``."""
    pool, slots = state.clone(), torch.arange(state.shape[0])
    outputs, states = [], []
    for t in range(call["q"].shape[1]):
        outputs.append(recurrent_kda_paged(**paged(rows(call, t, t + 1), pool, slots)))
        states.append(pool.clone())
    return torch.cat(outputs, 1), torch.stack(states, 1)


def packed(call: Call) -> Call:
    """A dense call of equal sequences, packed."""
    B, T = call["q"].shape[:2]
    tokens = {name: call[name].flatten(0, 1).unsqueeze(0) for name in TOKENS}
    return {**call, **tokens, "cu_seqlens": torch.arange(0, B * T + 1, T)}


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_speculative_decoding_has_the_bits_of_plain_decoding(
    dtype: torch.dtype, pool_dtype: torch.dtype, state_v_first: bool, layout: str
) -> None:
    N, tokens = 3, DRAFTS + 1
    call = make_call(tokens, B=N, K=48, V=40, dtype=dtype, initial_state=True, state_v_first=state_v_first)
    call["initial_state"] = call["initial_state"].to(pool_dtype)
    expected_o, expected_states = decode(call, call["initial_state"])
    slots = torch.randperm(N * tokens + 2, generator=torch.Generator().manual_seed(0))[: N * tokens].view(N, tokens)
    for accepted in range(1, tokens + 1):
        pool = torch.full((N * tokens + 2, *call["initial_state"].shape[1:]), torch.nan, dtype=pool_dtype)
        pool[slots[:, accepted - 1]] = call["initial_state"]
        spare = torch.ones(len(pool), dtype=torch.bool)
        spare[slots] = False
        on_pool = paged(packed(call) if layout == "packed" else call, pool, slots)
        o = recurrent_kda_paged(**on_pool, num_accepted_tokens=torch.full((N,), accepted))
        assert torch.equal(o.view_as(expected_o), expected_o)
        assert torch.equal(pool[slots], expected_states)
        assert pool[spare].isnan().all()


def test_rejected_drafts_leave_the_sequence_as_if_never_drafted() -> None:
    """Draft, accept a few, draft again from the slot of the last accepted token."""
    N, tokens = 2, DRAFTS + 1
    call = make_call(2 * tokens, B=N, initial_state=True)
    slots = torch.arange(N * tokens).view(N, tokens)
    pool = torch.zeros(N * tokens, *call["initial_state"].shape[1:])
    pool[slots[:, 0]] = call["initial_state"]
    recurrent_kda_paged(**paged(rows(call, 0, tokens), pool, slots))
    accepted = torch.tensor([1, 3], dtype=torch.int32)
    o = recurrent_kda_paged(**paged(rows(call, tokens), pool, slots), num_accepted_tokens=accepted)
    for n, kept in enumerate(accepted.tolist()):
        taken = [*range(kept), *range(tokens, 2 * tokens)]
        single = {**call, **{name: call[name][n : n + 1, taken] for name in TOKENS}}
        expected_o, expected_states = decode(single, call["initial_state"][n : n + 1])
        assert torch.equal(o[n : n + 1], expected_o[:, kept:])
        assert torch.equal(pool[slots[n]], expected_states[0, kept:])


def test_accepted_tokens_can_be_replayed_on_one_slot_a_sequence() -> None:
    """A call of the accepted tokens and new drafts, which writes the state between the two in place and no other."""
    N, tokens = 3, DRAFTS + 1
    call = make_call(2 * tokens, B=N, initial_state=True)
    accepted = torch.tensor([1, 3, 4])
    slots = torch.full((N, 2 * tokens), -1)
    slots[torch.arange(N), accepted - 1] = torch.arange(N)
    pool = call["initial_state"].clone()
    o = recurrent_kda_paged(**paged(call, pool, slots), num_accepted_tokens=accepted)
    expected_o, expected_states = decode(call, call["initial_state"])
    assert torch.equal(o, expected_o)
    assert torch.equal(pool, expected_states[torch.arange(N), accepted - 1])


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_invalid_counts_and_slots_mark_padding(layout: str) -> None:
    N, tokens = 6, 2
    call = make_call(tokens, B=N, initial_state=True)
    slots = torch.arange(N * tokens).view(N, tokens)
    slots[4, 1], slots[5, 0] = -1, N * tokens  # not written; read by nobody, since nothing was accepted there
    accepted = torch.tensor([1, 0, -3, 3, 1, 1])
    pool = torch.randn(N * tokens, *call["initial_state"].shape[1:])
    pool[2:8] = torch.nan
    before = pool.clone()
    on_pool = paged(packed(call) if layout == "packed" else call, pool, slots)
    o = recurrent_kda_paged(**on_pool, num_accepted_tokens=accepted).view_as(call["v"])
    assert not o[[1, 2, 3, 5]].any()
    for n in (0, 4):
        single = {**call, **{name: call[name][n : n + 1] for name in TOKENS}}
        expected_o, expected_states = decode(single, before[slots[n, :1]])
        assert torch.equal(o[n : n + 1], expected_o)
        kept = slots[n] >= 0
        assert torch.equal(pool[slots[n][kept]], expected_states[0][kept])
    untouched = [2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert torch.equal(pool[untouched].view(torch.uint8), before[untouched].view(torch.uint8))


def test_sequences_of_differing_lengths_are_decoded_together() -> None:
    call = make_call(7, cu_seqlens=[0, 3, 3, 4, 6], initial_state=True)
    N, slots_each = 4, 3
    slots = torch.arange(N * slots_each).view(N, slots_each)
    pool = torch.full((N * slots_each, *call["initial_state"].shape[1:]), torch.nan)
    pool[slots[:, 0]] = call["initial_state"]
    o = recurrent_kda_paged(**paged(call, pool, slots))
    expected_o, expected_state = reference(call)
    assert error(o, expected_o) < 2e-6
    last = slots.gather(1, (call["cu_seqlens"].diff() - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    assert error(pool[last], expected_state) < 2e-6
    assert torch.equal(pool[slots[1, 0]], call["initial_state"][1])
    unwritten = [slots[1, 1], slots[1, 2], slots[2, 1], slots[2, 2], slots[3, 2]]
    assert pool[torch.stack(unwritten)].isnan().all()


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
def test_tokens_beyond_the_slots_are_right_in_long_calls_too(pool_dtype: torch.dtype) -> None:
    """Where there may be many of them they are not taken one by one."""
    call = make_call(100, cu_seqlens=[2, 50, 50, 51, 53, 90], initial_state=True)
    call["initial_state"] = call["initial_state"].to(pool_dtype)
    N, width = 5, 3
    slots = torch.arange(N * width).view(N, width)
    pool = torch.full((N * width, *call["initial_state"].shape[1:]), torch.nan, dtype=pool_dtype)
    pool[slots[:, 0]] = call["initial_state"]
    o = recurrent_kda_paged(**paged(call, pool, slots))
    assert error(o, reference(call)[0]) < (2e-6 if pool_dtype == torch.float32 else 2e-2)
    assert not o[:, :2].any() and not o[:, 90:].any()
    for n, length in enumerate(call["cu_seqlens"].diff().tolist()):
        for t in range(width):
            if t < length:
                expected = state_after(call, n, t + 1)
                assert error(pool[slots[n, t]], expected) < (2e-6 if pool_dtype == torch.float32 else 2e-2)
            elif t > 0:
                assert pool[slots[n, t]].isnan().all()


def test_tokens_beyond_the_slots_of_their_sequence_are_not_written() -> None:
    call = make_call(4, cu_seqlens=[0, 3, 4], initial_state=True)
    slots = torch.tensor([[0, 1], [2, 3]])
    pool = torch.full((4, *call["initial_state"].shape[1:]), torch.nan)
    pool[slots[:, 0]] = call["initial_state"]
    o = recurrent_kda_paged(**paged(call, pool, slots))
    assert error(o, reference(call)[0]) < 2e-6
    first = {**rows(call, 0, 3), "cu_seqlens": None}
    _, states = decode(first, call["initial_state"][:1])
    assert torch.equal(pool[slots[0]], states[0, :2])
