"""The decode kernels, through their op, and the portable path on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import BETAS, GATES, TOKENS, Call, error, graph_of, make_call, output_error, paged, reference, rows
from torch import Tensor, nn

from flashkda_ops import chunk_kda, cuda, recurrent_kda_paged
from flashkda_ops.options import KdaOptions

pytestmark = pytest.mark.gpu

D = 128
INPUTS = (*TOKENS, "state_pool", "state_indices", "A_log", "dt_bias")
POOLS = [torch.float32, torch.bfloat16]


def decode_call(
    N: int,
    *,
    T: int = 1,
    cu_seqlens: list[int] | None = None,
    H: int = 2,
    HV: int = 4,
    spare_rows: int = 5,
    pool_dtype: torch.dtype = torch.float32,
    state_v_first: bool = True,
    seed: int = 0,
    **options: Any,
) -> Call:
    """A call that the kernels serve, on a pool in a random order. ``initial_state`` holds the states in the pool."""
    layout: dict[str, Any] = {"B": N} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    call = make_call(
        T, H=H, HV=HV, K=D, V=D, initial_state=True, state_v_first=state_v_first, device="cuda", seed=seed,
        **layout, **{"dtype": torch.bfloat16, **options},
    )  # fmt: skip
    rows = N + spare_rows
    slots = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:N].to("cuda", torch.int32)
    pool = torch.full((rows, HV, D, D), torch.nan, device="cuda", dtype=pool_dtype)
    pool[slots.long()] = call["initial_state"].to(pool_dtype)
    return {**paged(call, pool, slots), "initial_state": pool[slots.long()]}


def decode(call: Call) -> Tensor:
    """The op, where it takes a kernel."""
    assert cuda.recurrent_kda_paged_reason(*(call[name] for name in (*TOKENS, "state_pool"))) is None
    return recurrent_kda_paged(**{name: x for name, x in call.items() if name != "initial_state"})


def token_by_token(call: Call) -> tuple[Tensor, Tensor]:
    """A dense call, one token at a time: outputs, and the state after each token ``[N, T, ...]``."""
    call = cloned(call)
    outputs, after = [], []
    for t in range(call["q"].shape[1]):
        outputs.append(decode(rows(call, t, t + 1)))
        after.append(states(call))
    return torch.cat(outputs, 1), torch.stack(after, 1)


def packed(call: Call, dtype: torch.dtype = torch.int32) -> Call:
    """A dense call of equal sequences, packed."""
    N, T = call["q"].shape[:2]
    tokens = {name: call[name].flatten(0, 1).unsqueeze(0) for name in TOKENS}
    return {**call, **tokens, "cu_seqlens": torch.arange(0, N * T + 1, T, device="cuda", dtype=dtype)}


def states(call: Call) -> Tensor:
    return call["state_pool"][call["state_indices"].long()]


def cloned(call: Call) -> Call:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in call.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------------------------------


def assert_accurate(call: Call) -> None:
    o = decode(call)
    expected = reference(call)
    assert error(o, expected[0], heads=2) < (4e-3 if o.dtype == torch.bfloat16 else 6e-4)
    assert error(states(call), expected[1], heads=1) < (3e-6 if call["state_pool"].dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("N", [1, 3, 17, 64])
@pytest.mark.parametrize(("H", "HV"), [(16, 16), (4, 8), (2, 6)])
@pytest.mark.parametrize("slow", [0.0, 0.5, 1.0], ids=["fast gates", "mixed gates", "slow gates"])
def test_decode_follows_the_recurrence(slow: float, H: int, HV: int, N: int) -> None:
    assert_accurate(decode_call(N, H=H, HV=HV, slow_heads=int(slow * HV)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_every_option_follows_the_recurrence(gate: str, beta: str, l2norm: bool, dtype: torch.dtype) -> None:
    assert_accurate(decode_call(5, gate=gate, beta=beta, l2norm=l2norm, dtype=dtype))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("wide", [("g",), ("beta",), ("g", "beta")])
def test_gates_may_be_fp32(wide: tuple[str, ...], T: int) -> None:
    call = decode_call(5, T=T)
    assert_accurate({**call, **{name: call[name].float() for name in wide}})


@pytest.mark.parametrize("T", [1, 2, 4, 8, 9, 37])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("pool_dtype", POOLS)
def test_every_pool_and_number_of_tokens_follow_the_recurrence(
    pool_dtype: torch.dtype, state_v_first: bool, T: int
) -> None:
    assert_accurate(decode_call(5, T=T, pool_dtype=pool_dtype, state_v_first=state_v_first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_follows_the_recurrence_over_several_tokens(gate: str, dtype: torch.dtype) -> None:
    assert_accurate(decode_call(3, T=4, gate=gate, dtype=dtype, H=2, HV=6))


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("pool_dtype", POOLS)
def test_sequences_of_differing_lengths_are_decoded_together(pool_dtype: torch.dtype, state_v_first: bool) -> None:
    lengths = [0, 1, 8, 3, 0, 5, 70, 2, 4, 6, 7, 9, 0]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    N, used = len(lengths), bounds[-1]
    call = decode_call(N, T=used + 30, cu_seqlens=bounds, pool_dtype=pool_dtype, state_v_first=state_v_first)
    for name in TOKENS:
        call[name][:, used:] = torch.nan
    before = call["state_pool"].clone()
    o = decode(call)
    assert not o[:, used:].any()
    expected = reference({**call, **{name: call[name][:, :used] for name in TOKENS}})
    assert error(o[:, :used], expected[0], heads=2) < 4e-3
    assert error(states(call), expected[1], heads=1) < (3e-6 if pool_dtype == torch.float32 else 3e-3)
    untouched = torch.ones(len(before), dtype=torch.bool, device="cuda")
    untouched[call["state_indices"][torch.tensor(lengths, device="cuda") > 0].long()] = False
    assert same_bits(call["state_pool"][untouched], before[untouched])


@pytest.mark.parametrize("slow", [0.0, 0.5, 1.0], ids=["fast gates", "mixed gates", "slow gates"])
@pytest.mark.parametrize("N", [1, 32])
@pytest.mark.parametrize("T", [1, 4])
def test_the_error_is_no_worse_than_that_of_flash_linear_attention(T: int, N: int, slow: float) -> None:
    fla = pytest.importorskip("fla.ops.kda").fused_recurrent_kda
    call = decode_call(N, T=T, H=8, HV=16, slow_heads=int(16 * slow))
    expected = reference(call)
    options = {name: x for name, x in call.items() if name not in ("state_pool", "state_indices")}
    theirs = fla(**options, output_final_state=True)
    ours = decode(call), states(call)
    for actual, other, exact, heads in zip(ours, theirs, expected, (2, 1), strict=True):
        assert error(actual, exact) <= 1.1 * error(other, exact)
        assert error(actual, exact, heads) <= 1.1 * error(other, exact, heads)


# ---------------------------------------------------------------------------------------------------------------------
# Rows, strides and batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_slots_outside_the_pool_are_padding(index_dtype: torch.dtype, T: int) -> None:
    call = decode_call(6, T=T)
    rows = call["state_pool"].shape[0]
    live = torch.tensor([True, False, True, False, False, True], device="cuda")
    outside = torch.tensor([-1, -1, 0, rows, 2**31 - 1, 0], device="cuda")
    expected = reference(call)
    call["state_indices"] = torch.where(live, call["state_indices"], outside).to(index_dtype)
    for name in TOKENS:
        call[name][~live] = torch.nan
    before = call["state_pool"].clone()
    o = decode(call)
    assert not o[~live].any()
    slots = call["state_indices"][live].long()
    assert output_error((o[live], call["state_pool"][slots]), (expected[0][live], expected[1][live])) < 4e-3
    untouched = torch.ones(rows, dtype=torch.bool, device="cuda").index_fill_(0, slots, False)
    assert same_bits(call["state_pool"][untouched], before[untouched])


@pytest.mark.parametrize("pool_dtype", POOLS)
@pytest.mark.parametrize("T", [1, 5])
def test_strides_change_no_bit(T: int, pool_dtype: torch.dtype) -> None:
    call = decode_call(5, T=T, pool_dtype=pool_dtype)
    strided = cloned(call)
    parts = [call[name].flatten(2) for name in ("q", "k", "v")]
    fused = torch.cat(parts, -1).repeat(1, 3, 1)[:, T : 2 * T].split([x.shape[-1] for x in parts], -1)
    strided |= {n: x.unflatten(-1, call[n].shape[2:]) for n, x in zip(("q", "k", "v"), fused, strict=True)}
    strided["g"] = torch.cat([call["g"], call["g"]], -1)[..., D:]
    strided["beta"] = call["beta"].repeat_interleave(2, -1)[..., ::2]
    wide = torch.stack((torch.full_like(call["state_pool"], torch.nan), call["state_pool"]), 1)
    strided["state_pool"] = wide[:, 1]
    strided["state_indices"] = call["state_indices"].repeat_interleave(2)[::2]
    assert same_bits(decode(strided), decode(call))
    assert same_bits(strided["state_pool"], call["state_pool"])
    assert wide[:, 0].isnan().all()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
def test_layouts_that_need_a_copy_change_no_bit(name: str, T: int) -> None:
    call = decode_call(5, T=T)
    x = call[name]
    unaligned = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    copies = [cloned(call) | {name: other} for other in (unaligned, transposed)]
    expected = decode(call)
    for copy in copies:
        assert same_bits(decode(copy), expected) and same_bits(copy["state_pool"], call["state_pool"])


@pytest.mark.parametrize("T", [1, 6])
def test_a_sequence_has_the_same_bits_in_any_batch(T: int) -> None:
    call = decode_call(33, T=T)
    batched = cloned(call)
    o = decode(batched)
    for n in (0, 7, 32):
        alone = cloned(call)
        alone |= {name: alone[name][n : n + 1] for name in (*TOKENS, "state_indices")}
        assert same_bits(decode(alone), o[n : n + 1])
        assert same_bits(states(alone), states(batched)[n : n + 1])


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("pool_dtype", POOLS)
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("rows_per_warp", [2, 4, 8])
def test_the_split_of_work_changes_no_bit(
    rows_per_warp: int, T: int, pool_dtype: torch.dtype, state_v_first: bool
) -> None:
    call = decode_call(9, T=T, pool_dtype=pool_dtype, state_v_first=state_v_first)
    again, o = cloned(call), torch.empty_like(call["v"])
    options = KdaOptions(D**-0.5, *(again.get(name, default) for name, default in KdaOptions._field_defaults.items()))
    given = (again.get(name) for name in (*INPUTS, "cu_seqlens", "num_accepted_tokens"))
    cuda.recurrent_kda_paged(o, *given, options, state_v_first=state_v_first, rows_per_warp=rows_per_warp)
    assert same_bits(decode(call), o) and same_bits(call["state_pool"], again["state_pool"])


@pytest.mark.parametrize("pool_dtype", POOLS)
@pytest.mark.parametrize("T", [1, 5])
def test_both_state_layouts_have_the_same_bits(T: int, pool_dtype: torch.dtype) -> None:
    call = decode_call(5, T=T, pool_dtype=pool_dtype)
    k_first = {**cloned(call), "state_v_first": False, "state_pool": call["state_pool"].mT.contiguous()}
    assert same_bits(decode(k_first), decode(call))
    assert same_bits(k_first["state_pool"].mT, call["state_pool"])


def test_no_sequences_and_no_rows_launch_nothing() -> None:
    call = decode_call(3)
    before = call["state_pool"].clone()
    nothing = {name: call[name][:0] for name in (*TOKENS, "state_indices")}
    assert decode({**call, **nothing}).shape == (0, 1, 4, D)
    assert same_bits(call["state_pool"], before)
    assert not decode({**call, "state_pool": call["state_pool"][:0]}).any()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("T", [1, 2, 8, 19])
def test_a_call_of_several_tokens_has_the_bits_of_decoding_token_by_token(
    T: int, state_v_first: bool, index_dtype: torch.dtype
) -> None:
    call = decode_call(7, T=T, state_v_first=state_v_first)
    expected_o, expected_states = token_by_token(call)
    for several in (cloned(call), packed(cloned(call), index_dtype)):
        assert same_bits(decode(several).view_as(expected_o), expected_o)
        assert same_bits(states(several), expected_states[:, -1])


def test_states_in_a_bf16_pool_are_computed_in_fp32() -> None:
    """A decay too slow for bf16 is not lost between the tokens of a call."""
    call = decode_call(1, T=64, H=1, HV=1, gate="precomputed", beta="raw", pool_dtype=torch.bfloat16)
    call["g"] = torch.full_like(call["g"], -1e-3)
    call["beta"] = torch.zeros_like(call["beta"])
    decay = call["g"][0, 0, 0, 0].double() * 64
    decode(call)
    expected = call["initial_state"].double() * decay.exp()
    torch.testing.assert_close(states(call).double(), expected, rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    "bounds", [[0, 30, 10, 40, 40], [-5, 20, 40, 10**9, 3], [2**31 - 1, -(2**31), 3, 3, 9], [50, 60, 70, 80, 90]]
)
def test_a_malformed_cu_seqlens_stays_in_bounds(bounds: list[int]) -> None:
    call = decode_call(4, T=40, cu_seqlens=bounds)
    before = call["state_pool"].clone()
    for name in TOKENS:  # what lies around the tokens is NaN, so that no finite state has read it
        wide = torch.full_like(call[name], torch.nan).repeat(1, 3, *[1] * (call[name].dim() - 2))
        wide[:, 40:80] = call[name]
        call[name] = wide[:, 40:80]
    decode(call)
    assert torch.isfinite(states(call)).all()
    untouched = torch.ones(len(before), dtype=torch.bool, device="cuda")
    untouched[call["state_indices"].long()] = False
    assert same_bits(call["state_pool"][untouched], before[untouched])


def test_other_devices_are_rejected_by_name() -> None:
    call = decode_call(3)
    for name in INPUTS[1:]:
        with pytest.raises(ValueError, match=f"^{name} must be on cuda:0 as q is, got cpu$"):
            decode({**call, name: call[name].cpu()})


# ---------------------------------------------------------------------------------------------------------------------
# Speculative decoding
# ---------------------------------------------------------------------------------------------------------------------


def with_slots(call: Call, slots: Tensor, accepted: Tensor | None, index_dtype: torch.dtype = torch.int32) -> Call:
    """The call on a pool with a row for each token, all NaN but for those it starts from."""
    pool = torch.full((int(slots.max()) + 3, *call["state_pool"].shape[1:]), torch.nan, device="cuda")
    pool = pool.to(call["state_pool"].dtype)
    start = torch.zeros(len(slots), dtype=torch.int64, device="cuda") if accepted is None else accepted - 1
    pool[slots.gather(1, start.unsqueeze(1)).squeeze(1)] = states(call)
    accepted = None if accepted is None else accepted.to(index_dtype)
    return {**call, "state_pool": pool, "state_indices": slots.to(index_dtype), "num_accepted_tokens": accepted}


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("pool_dtype", POOLS)
@pytest.mark.parametrize("T", [1, 4, 8])
def test_speculative_decoding_has_the_bits_of_plain_decoding(
    T: int, pool_dtype: torch.dtype, state_v_first: bool, layout: str
) -> None:
    N = 3
    call = decode_call(N, T=T, pool_dtype=pool_dtype, state_v_first=state_v_first)
    expected_o, expected_states = token_by_token(call)
    slots = torch.randperm(N * T, generator=torch.Generator().manual_seed(0)).view(N, T).cuda()
    for accepted in (None, *range(1, T + 1)):
        counts = None if accepted is None else torch.full((N,), accepted, device="cuda")
        index_dtype = torch.int64 if accepted == 2 else torch.int32
        drafts = with_slots(packed(call) if layout == "packed" else call, slots, counts, index_dtype)
        assert same_bits(decode(drafts).view_as(expected_o), expected_o)
        assert same_bits(drafts["state_pool"][slots], expected_states)
        assert drafts["state_pool"][N * T :].isnan().all()


def test_accepting_any_number_of_drafts_gives_the_state_of_plain_decoding() -> None:
    """Draft, accept, draft again from the slot of the last token that was accepted: each sequence another number."""
    N, T = 4, 4
    call = decode_call(N, T=2 * T)
    slots = torch.arange(N * T, device="cuda").view(N, T)
    accepted = torch.arange(1, N + 1, device="cuda")
    first = with_slots(rows(call, 0, T), slots, None)
    decode(first)
    second = {**first, **{name: call[name][:, T:] for name in TOKENS}, "num_accepted_tokens": accepted}
    o = decode(second)
    for n, kept in enumerate(accepted.tolist()):
        taken = [*range(kept), *range(T, 2 * T)]
        single = {name: call[name][n : n + 1] for name in ("state_indices", "initial_state")}
        single |= {name: call[name][n : n + 1, taken] for name in TOKENS}
        expected_o, expected_states = token_by_token({**call, **single})
        assert same_bits(o[n : n + 1], expected_o[:, kept:])
        assert same_bits(second["state_pool"][slots[n]], expected_states[0, kept:])


@pytest.mark.parametrize("pool_dtype", POOLS)
def test_accepted_tokens_can_be_replayed_on_one_slot_a_sequence(pool_dtype: torch.dtype) -> None:
    N, T = 4, 4
    call = decode_call(N, T=2 * T, pool_dtype=pool_dtype)
    expected_o, expected_states = token_by_token(call)
    accepted, every = torch.arange(1, N + 1, device="cuda"), torch.arange(N, device="cuda")
    slots = torch.full((N, 2 * T), -1, device="cuda")
    slots[every, accepted - 1] = call["state_indices"].long()
    before = call["state_pool"].clone()
    o = decode({**call, "state_indices": slots, "num_accepted_tokens": accepted})
    assert same_bits(o, expected_o)
    assert same_bits(states(call), expected_states[every, accepted - 1])
    untouched = torch.ones(len(before), dtype=torch.bool, device="cuda")
    untouched[call["state_indices"].long()] = False
    assert same_bits(call["state_pool"][untouched], before[untouched])


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_invalid_counts_and_slots_mark_padding(layout: str) -> None:
    N, T = 6, 2
    call = decode_call(N, T=T)
    expected_o, expected_states = token_by_token(call)
    slots = torch.arange(N * T, device="cuda").view(N, T)
    drafts = with_slots(packed(call) if layout == "packed" else call, slots, torch.ones_like(slots[:, 0]))
    drafts["num_accepted_tokens"] = torch.tensor([1, 0, -3, 3, 1, 1], device="cuda")
    drafts["state_indices"] = slots.clone()
    drafts["state_indices"][4, 1], drafts["state_indices"][5, 0] = -1, 10**12
    before = drafts["state_pool"].clone()
    o = decode(drafts).view_as(expected_o)
    assert not o[[1, 2, 3, 5]].any()
    assert same_bits(o[[0, 4]], expected_o[[0, 4]])
    written = drafts["state_pool"][[0, 1, 8]]
    assert same_bits(written, torch.stack([*expected_states[0], expected_states[4, 0]]))
    untouched = [2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert same_bits(drafts["state_pool"][untouched], before[untouched])


def test_tokens_beyond_the_slots_of_their_sequence_are_not_written() -> None:
    call = decode_call(2, T=3)
    expected_o, expected_states = token_by_token(call)
    slots = torch.arange(4, device="cuda").view(2, 2)
    drafts = with_slots(packed(call), slots, None)
    assert same_bits(decode(drafts).view_as(expected_o), expected_o)
    assert same_bits(drafts["state_pool"][slots], expected_states[:, :2])


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs and the compiler
# ---------------------------------------------------------------------------------------------------------------------


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode(call)
    return graph, o


def refill(call: Call, new: Call) -> None:
    """Other contents in the same memory."""
    for name in INPUTS:
        call[name].copy_(new[name])


def test_a_captured_step_replays_with_other_contents() -> None:
    call = decode_call(6)
    graph, o = captured(call)
    for seed in (1, 2, 3):
        new = decode_call(6, seed=seed)
        new["state_indices"][seed] = -1
        refill(call, new)
        graph.replay()
        assert same_bits(decode(new), o) and same_bits(new["state_pool"], call["state_pool"])


def test_captured_drafts_replay_with_other_lengths_slots_and_counts() -> None:
    N, T = 5, 20
    call = decode_call(N, T=T, cu_seqlens=[0] * (N + 1))
    slots = torch.arange(N * 8, device="cuda").view(N, 8)
    call = with_slots(call, slots, torch.ones(N, dtype=torch.int64, device="cuda"))
    eager = cloned(call)
    graph, o = captured(call)
    generator = torch.Generator().manual_seed(0)
    for seed in range(4):
        new = decode_call(N, T=T, seed=seed)
        lengths = torch.randint(0, 5, (N,), generator=generator)
        changes = {
            **{name: packed(new)[name][:, :T] for name in TOKENS},
            "cu_seqlens": torch.tensor([0, *lengths.cumsum(0)]),
            "state_indices": slots[torch.randperm(N, generator=generator).cuda()],
            "num_accepted_tokens": torch.randint(1, 9, (N,), generator=generator),
            "state_pool": torch.randn(call["state_pool"].shape, generator=generator),
        }
        for x in (call, eager):
            for name, value in changes.items():
                x[name].copy_(value)
        graph.replay()
        assert same_bits(decode(eager), o) and same_bits(eager["state_pool"], call["state_pool"])
        assert not o[:, int(lengths.sum()) :].any()


def test_two_graphs_share_nothing() -> None:
    calls = [decode_call(4, seed=1), decode_call(7, seed=2)]
    eager = [cloned(call) for call in calls]
    graphs = [captured(call) for call in calls]
    for i in (0, 1, 1, 0, 0, 1):
        graphs[i][0].replay()
        expected = decode(eager[i])
        assert same_bits(graphs[i][1], expected)
    for call, other in zip(calls, eager, strict=True):
        assert same_bits(call["state_pool"], other["state_pool"])


FRESH_PROCESS = """
from test_decode_cuda import captured, cloned, decode, decode_call, same_bits
call = decode_call(5)
eager = cloned(call)
graph, o = captured(call)
graph.replay()
assert same_bits(o, decode(eager)) and same_bits(call["state_pool"], eager["state_pool"])
print("captured")
"""


def test_the_first_call_of_a_process_can_be_captured() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    process = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.stdout.strip() == "captured", process.stderr


@pytest.mark.parametrize("T", [1, 3])
def test_the_op_is_sound_on_cuda_tensors(T: int) -> None:
    call = {name: x for name, x in decode_call(3, T=T).items() if name != "initial_state"}
    call["state_pool"] = torch.randn_like(call["state_pool"])  # opcheck compares pools, and NaN with NaN is unequal
    torch.library.opcheck(torch.ops.flashkda.recurrent_kda_paged.default, (), call)


class DecodeStep(nn.Module):
    """A decode step with the states in a buffer."""

    state_pool: Tensor

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.register_buffer("state_pool", call["state_pool"].clone())
        self.options = {n: x for n, x in call.items() if n not in (*TOKENS, "state_pool", "state_indices")}
        del self.options["initial_state"]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_indices: Tensor) -> Tensor:
        return recurrent_kda_paged(q, k, v, g, beta, self.state_pool, state_indices, **self.options) * 2


def test_reduce_overhead_captures_a_pool_that_is_a_buffer() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    call = decode_call(4)
    eager, compiled = DecodeStep(call), DecodeStep(call)
    step = torch.compile(compiled, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(6):  # warm-up, recording, replays
            new = decode_call(4, seed=seed)
            tokens = [new[name] for name in TOKENS]
            slots = call["state_indices"].roll(seed)
            torch.compiler.cudagraph_mark_step_begin()
            assert same_bits(step(*tokens, slots), eager(*tokens, slots))
            assert same_bits(compiled.state_pool, eager.state_pool)
    assert counters["inductor"]["cudagraph_skips"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# The portable path on a GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"B": 2}, {"cu_seqlens": [0, 3, 3, 60]}], ids=["dense", "packed"])
@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
def test_the_portable_path_follows_the_recurrence(gate: str, layout: dict[str, Any]) -> None:
    call = make_call(70, K=64, V=64, gate=gate, initial_state=True, device="cuda", **layout)
    assert output_error(chunk_kda(**call, output_final_state=True), reference(call)) < 1e-5


def test_the_portable_path_replays_with_another_cu_seqlens() -> None:
    call = make_call(200, K=64, V=64, cu_seqlens=[0, 64, 64, 150], initial_state=True, device="cuda")
    tokens = [call[name].requires_grad_() for name in TOKENS]

    def step() -> tuple[Tensor, ...]:
        o, state = chunk_kda(**call, output_final_state=True)
        return o, state, *torch.autograd.grad((o, state), tokens, (torch.ones_like(o), torch.ones_like(state)))

    graph, outputs = graph_of(step)
    for bounds in ([0, 0, 0, 0], [0, 200, 200, 200], [0, 1, 2, 3], [0, 33, 97, 200]):
        call["cu_seqlens"].copy_(torch.tensor(bounds))
        graph.replay()
        for actual, expected in zip(outputs, step(), strict=True):
            assert error(actual, expected) < 1e-6
