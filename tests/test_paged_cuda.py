"""Prefill on the rows of a pool, by the kernel: the bits of gathering the rows, prefill and scattering them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import GATES, TOKENS, Call, error, kernel_call, paged, random_cu_seqlens, reference
from torch import Tensor

from flashkda_ops import chunk_kda, chunk_kda_paged, cuda

pytestmark = pytest.mark.gpu

POOLS = [torch.float32, torch.bfloat16]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one token": {"T": 1, "B": 3},
    "dense": {"T": 150, "B": 3, "H": 32, "HV": 32},
    "dense, half heads": {"T": 37, "B": 5},
    "segments": {"T": 1024, "B": 3, "slow_heads": 0},
    "segments, slow gates": {"T": 1024, "B": 3},
    "packed": {"T": 320, "cu_seqlens": [0, 100, 101, 101, 133, 300], "H": 24, "HV": 24},
    "packed, half heads": {"T": 320, "cu_seqlens": [0, 0, 77, 77, 200, 200], "HV": 6},
    "packed, shares": {"T": 3000, "cu_seqlens": [0, 1000, 1000, 1040, 2900], "slow_heads": 0},
    "packed, shares, slow gates": {"T": 3000, "cu_seqlens": [0, 1000, 1000, 1040, 2900]},
    "packed tokens": {"T": 64, "cu_seqlens": list(range(65))},
}


def pool_call(
    pool_dtype: torch.dtype = torch.float32,
    *,
    spare_rows: int = 5,
    seed: int = 0,
    strided: bool = False,
    **options: Any,
) -> Call:
    """A call on a pool in a random order, whose other rows are NaN."""
    call = kernel_call(seed=seed, **options)
    states = call["initial_state"]
    N, generator = states.shape[0], torch.Generator().manual_seed(seed)
    wide = torch.full((N + spare_rows, 2, *states.shape[1:]), torch.nan, device="cuda", dtype=pool_dtype)
    pool = wide[:, 1] if strided else wide[:, 1].clone()
    slots = torch.randperm(N + spare_rows, generator=generator)[:N].cuda()
    pool[slots] = states.to(pool_dtype)
    return paged(call, pool, slots)


def run(call: Call) -> Tensor:
    """The function, where the kernel serves the call on the pool itself."""
    tokens = (call.get(x) for x in (*TOKENS, "A_log", "dt_bias", "initial_state", "cu_seqlens"))
    assert cuda.chunk_kda_reason(*tokens) is None and cuda.chunk_kda_paged_reason(call["state_pool"]) is None
    return chunk_kda_paged(**call)


@contextmanager
def no_kernel_on_pools() -> Iterator[None]:
    """Rows are gathered and scattered around the kernel; with checkpoints, around the portable path."""
    with mock.patch.object(cuda, "chunk_kda_paged_reason", return_value="not here"):
        yield


def gathered(call: Call) -> Tensor:
    with no_kernel_on_pools():
        return chunk_kda_paged(**call)


def cloned(call: Call) -> Call:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in call.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_as_gathered(call: Call) -> Call:
    """Runs the call. Outputs and the whole pool have the bits of the other way."""
    other = cloned(call)
    expected = gathered(other)
    assert same_bits(run(call), expected)
    assert same_bits(call["state_pool"], other["state_pool"])
    return call


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("pool_dtype", POOLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_bits_of_gathered_rows(layout: str, pool_dtype: torch.dtype, state_v_first: bool) -> None:
    call = pool_call(pool_dtype, state_v_first=state_v_first, **LAYOUTS[layout])
    assert_as_gathered(call)
    assert call["state_pool"][call["state_indices"]].isfinite().all()


@pytest.mark.parametrize("layout", ["dense", "segments", "packed"])
@pytest.mark.parametrize("wide", [(), ("g", "beta")], ids=["16-bit gate", "fp32 gate"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_instantiation_has_the_bits_of_gathered_rows(
    dtype: torch.dtype, gate: str, wide: tuple[str, ...], layout: str
) -> None:
    call = pool_call(dtype=dtype, gate=gate, **LAYOUTS[layout])
    assert_as_gathered(call | {name: call[name].float() for name in wide})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_without_an_initial_state_starts_from_zero(layout: str) -> None:
    call = pool_call(**LAYOUTS[layout])
    has = torch.arange(len(call["state_indices"]), device="cuda") % 2 == 0
    call["state_pool"][call["state_indices"][~has]] = torch.nan
    lengths = call["cu_seqlens"].diff() if "cu_seqlens" in call else torch.ones_like(call["state_indices"])
    assert_as_gathered({**call, "has_initial_state": has.repeat_interleave(2)[::2]})
    left = call["state_indices"][~has & (lengths == 0)]  # an empty sequence leaves its row, which is NaN
    assert call["state_pool"][left].isnan().all()
    assert call["state_pool"][call["state_indices"][(lengths > 0)]].isfinite().all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_outside_the_pool_are_neither_read_nor_written(layout: str, index_dtype: torch.dtype) -> None:
    call = pool_call(**LAYOUTS[layout])
    slots, pool = call["state_indices"], call["state_pool"]
    N, rows = len(slots), len(pool)
    outside = [-1, rows, 2**31 - 1, -(2**31)]
    if index_dtype == torch.int64:
        outside += [2**32 + int(slots[0]), -(2**32) + int(slots[0]), 2**63 - 1, -(2**63)]
    live = torch.arange(N, device="cuda") % 3 == 1
    chosen = itertools.islice(itertools.cycle(outside), N)
    call["state_indices"] = torch.where(live, slots, torch.tensor(list(chosen), device="cuda")).to(index_dtype)
    pool[slots[~live]] = torch.nan
    bounds = call["cu_seqlens"].tolist() if "cu_seqlens" in call else None
    padding = []
    for n in (~live).nonzero().flatten().tolist():
        padding.append((n,) if bounds is None else (0, slice(bounds[n], bounds[n + 1])))
        for name in TOKENS:
            call[name][padding[-1]] = torch.nan
    before = pool.clone()
    o = run(call)
    assert all(not o[where].any() for where in padding)
    expected = pool_call(**LAYOUTS[layout])
    expected_o = run(expected)
    for n in live.nonzero().flatten().tolist():
        where = (n,) if bounds is None else (0, slice(bounds[n], bounds[n + 1]))
        assert same_bits(o[where], expected_o[where])
        assert same_bits(pool[slots[n]], expected["state_pool"][slots[n]])
    untouched = torch.ones(rows, dtype=torch.bool, device="cuda").index_fill_(0, slots[live], False)
    assert same_bits(pool[untouched], before[untouched])


@pytest.mark.parametrize("pool_dtype", POOLS)
@pytest.mark.parametrize("layout", ["dense", "segments", "packed, half heads"])
def test_strides_change_no_bit(layout: str, pool_dtype: torch.dtype) -> None:
    dense, strided = (pool_call(pool_dtype, strided=strided, **LAYOUTS[layout]) for strided in (False, True))
    strided["state_indices"] = strided["state_indices"].repeat_interleave(3)[::3]
    assert same_bits(run(strided), run(dense))
    assert same_bits(strided["state_pool"], dense["state_pool"])
    assert strided["state_pool"]._base[:, 0].isnan().all()


def test_an_unaligned_pool_is_gathered() -> None:
    call = pool_call(**LAYOUTS["packed"])
    unaligned = cloned(call)
    flat = torch.empty(call["state_pool"].numel() + 1, device="cuda")[1:]
    unaligned["state_pool"] = flat.view(call["state_pool"].shape).copy_(call["state_pool"])
    assert same_bits(chunk_kda_paged(**unaligned), run(call))
    assert same_bits(unaligned["state_pool"], call["state_pool"])


def test_rows_beyond_four_gigabytes_are_found() -> None:
    call = pool_call(T=20, B=2, H=1, HV=1)
    rows, far = len(call["state_pool"]), 70_000  # 64 KiB a row
    wide = torch.empty(far + rows, 1, 128, 128, device="cuda")
    wide[far:] = call["state_pool"]
    o = run({**call, "state_pool": wide, "state_indices": call["state_indices"] + far})
    assert same_bits(o, run(call)) and same_bits(wide[far:], call["state_pool"])


@pytest.mark.parametrize("bounds", [[0, 30, 10, 40, 40], [-5, 20, 40, 10**9, 3], [50, 60, 70, 80, 90]])
def test_a_malformed_cu_seqlens_stays_in_bounds(bounds: list[int]) -> None:
    call = pool_call(T=40, cu_seqlens=bounds)
    for name in TOKENS:  # what lies around the tokens is NaN, so that no finite state has read it
        wide = torch.full_like(call[name], torch.nan).repeat(1, 3, *[1] * (call[name].dim() - 2))
        wide[:, 40:80] = call[name]
        call[name] = wide[:, 40:80]
    before = call["state_pool"].clone()
    assert run(call).isfinite().all() and call["state_pool"][call["state_indices"]].isfinite().all()
    untouched = torch.ones(len(before), dtype=torch.bool, device="cuda").index_fill_(0, call["state_indices"], False)
    assert same_bits(call["state_pool"][untouched], before[untouched])


def test_a_slot_named_twice_is_an_error_in_checked_mode() -> None:
    call = pool_call(T=40, B=3)
    call["state_indices"][2] = call["state_indices"][0]
    with pytest.raises(ValueError, match=r"^state_indices must name each row of state_pool once"):
        chunk_kda_paged(**call, validate=True)


def test_the_last_segment_never_overtakes_the_first() -> None:
    """Few heads with fast gates: the block that writes a row may be done before the one that reads it begins."""
    call = pool_call(T=2048, B=1, H=1, HV=1, slow_heads=0)
    expected = cloned(call)
    o = gathered(expected)
    for _ in range(50):
        again = cloned(call)
        assert same_bits(run(again), o) and same_bits(again["state_pool"], expected["state_pool"])


def test_no_memory_is_taken_for_states() -> None:
    call = pool_call(T=64, cu_seqlens=list(range(65)), H=16, HV=16)
    run(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = run(call)
    assert torch.cuda.max_memory_allocated() - before < o.nbytes + 2**20 < call["state_pool"].nbytes


def test_prefill_in_parts_is_prefill_at_once() -> None:
    """As a server reads a long prompt. The first part has a length of whole chunks, so that even the bits agree."""
    call = pool_call(T=200, B=2) | {"batch_invariant": True}
    parts = cloned(call)
    o = torch.cat([run({**parts, **{x: call[x][:, a:b] for x in TOKENS}}) for a, b in ((0, 96), (96, 200))], 1)
    assert same_bits(o, run(call)) and same_bits(parts["state_pool"], call["state_pool"])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def with_checkpoints(call: Call, offsets: list[list[int]], index_dtype: torch.dtype = torch.int32) -> Call:
    """The call on a larger pool, with a row for each checkpoint in a random order."""
    N, width, rows = len(offsets), len(offsets[0]), len(call["state_pool"])
    more = torch.full((N * width, *call["state_pool"].shape[1:]), torch.nan, device="cuda")
    pool = torch.cat((call["state_pool"], more.to(call["state_pool"].dtype)))
    order = torch.randperm(N * width, generator=torch.Generator().manual_seed(0)).view(N, width) + rows
    checkpoints = {"checkpoint_offsets": torch.tensor(offsets), "checkpoint_indices": order}
    return {**call, "state_pool": pool} | {name: x.to("cuda", index_dtype) for name, x in checkpoints.items()}


def states_on_the_way(call: Call, n: int, start: int, length: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """By a call a piece: the offsets of sequence n in order, the outputs before each and the states there, in fp32."""
    row = 0 if "cu_seqlens" in call else n
    given = {name: x for name, x in call.items() if name not in ("state_pool", "state_indices", "cu_seqlens")}
    offsets = sorted(x for x in given.pop("checkpoint_offsets")[n].tolist() if 0 < x <= length)
    del given["checkpoint_indices"]
    slot = call["state_indices"][n : n + 1]
    state, done = call["state_pool"][slot].float(), 0
    for offset in [*offsets, length]:
        if offset > done:
            tokens = {name: call[name][row : row + 1, start + done : start + offset] for name in TOKENS}
            o, state = chunk_kda(**{**given, **tokens}, initial_state=state, output_final_state=True)
        else:
            o = call["v"][:0]
        yield offset, o, state
        done = offset


OFFSETS = [[1, 37, 40, 37], [40, 2, 0, 1], [33, 32, 31, 90], [-1, 5, 41, 5], [16, 32, 48, 64]]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("pool_dtype", POOLS)
@pytest.mark.parametrize(
    "layout",
    [{"T": 64, "B": 5}, {"T": 64, "B": 5, "HV": 32}, {"T": 200, "cu_seqlens": [0, 40, 42, 42, 83, 180]}],
    ids=["dense, half heads", "dense", "packed"],
)
def test_a_call_with_checkpoints_has_the_bits_of_calls_on_the_pieces(
    layout: dict[str, Any], pool_dtype: torch.dtype, state_v_first: bool, index_dtype: torch.dtype
) -> None:
    call = pool_call(pool_dtype, state_v_first=state_v_first, **layout) | {"batch_invariant": True}
    call = with_checkpoints(call, OFFSETS, index_dtype)
    before = call["state_pool"].clone()
    pieces = {**call, "state_pool": before}
    o, pool = run(call), call["state_pool"]
    bounds = call["cu_seqlens"].tolist() if "cu_seqlens" in call else None
    written = [int(slot) for slot in call["state_indices"]]
    for n, slots in enumerate(call["checkpoint_indices"].tolist()):
        row, start, end = (n, 0, layout["T"]) if bounds is None else (0, bounds[n], bounds[n + 1])
        done = 0
        for offset, o_piece, state in states_on_the_way(pieces, n, start, end - start):
            if offset > done:
                assert same_bits(o[row : row + 1, start + done : start + offset], o_piece)
            for slot, wanted in zip(slots, OFFSETS[n], strict=True):
                if wanted == offset > 0:
                    assert same_bits(pool[slot : slot + 1], state.to(pool_dtype))
                    written.append(slot)
            done = offset
        slot = int(call["state_indices"][n])
        assert same_bits(pool[slot : slot + 1], state.to(pool_dtype) if end > start else before[slot : slot + 1])
    untouched = torch.ones(len(pool), dtype=torch.bool, device="cuda")
    untouched[written] = False
    assert untouched.any() and same_bits(pool[untouched], before[untouched])


@pytest.mark.parametrize("T", [4096, 4088])
def test_checkpoints_at_whole_chunks_change_no_bit(T: int) -> None:
    call = pool_call(T=T, B=2, H=1, HV=1) | {"batch_invariant": True}
    checked = with_checkpoints(call, [list(range(4080, 0, -16))] * 2)
    assert same_bits(run(checked), run(call))
    assert same_bits(checked["state_pool"][: len(call["state_pool"])], call["state_pool"])
    last = checked["checkpoint_indices"][:, 0]
    run(paged({**call, **{name: call[name][:, 4080:] for name in TOKENS}}, checked["state_pool"], last))
    assert same_bits(checked["state_pool"][last], call["state_pool"][call["state_indices"]])


def test_checkpoints_agree_with_the_reference() -> None:
    call = kernel_call(300, H=2, HV=2, state_v_first=True)
    offsets = [[299, 7, 100, 300]]
    pool = torch.cat((call["initial_state"], torch.full((4, 2, 128, 128), torch.nan, device="cuda")))
    slots = torch.arange(1, 5, device="cuda").view(1, 4)
    checkpoints = {"checkpoint_offsets": torch.tensor(offsets, device="cuda"), "checkpoint_indices": slots}
    o = run(paged(call, pool, torch.zeros(1, device="cuda", dtype=torch.int32), **checkpoints))
    assert error(o, reference(call)[0], heads=2) < 8e-3
    for slot, offset in enumerate(offsets[0], 1):
        state = reference({**call, **{x: call[x][:, :offset] for x in TOKENS}})[1]
        assert error(pool[slot : slot + 1], state, heads=1) < 8e-3
    assert same_bits(pool[0], pool[4])


def test_checkpoints_of_padding_and_outside_the_pool_are_not_written() -> None:
    call = with_checkpoints(pool_call(T=40, B=3), [[3, 40]] * 3, torch.int64)
    call["state_indices"][1] = -1
    rows = len(call["state_pool"])
    call["checkpoint_indices"][0, 1], call["checkpoint_indices"][2, 0] = -1, 2**32
    call["checkpoint_offsets"][2, 1] = 2**33
    other = cloned(call)
    gathered(other)
    run(call)
    written = call["state_pool"].flatten(1).isfinite().all(1)
    assert torch.equal(written, other["state_pool"].flatten(1).isfinite().all(1))
    assert int((~call["state_pool"].flatten(1).isnan().all(1)).sum()) == int(written.sum()) < rows


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = run(call)
    return graph, o


@pytest.mark.parametrize("pool_dtype", POOLS)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_captured_calls_replay_with_other_sequences_and_slots(checkpoints: bool, pool_dtype: torch.dtype) -> None:
    T, N, generator = 400, 6, torch.Generator().manual_seed(0)
    call = pool_call(pool_dtype, T=T, cu_seqlens=[0] * (N + 1), spare_rows=N * 3, HV=8)
    call["has_initial_state"] = torch.zeros(N, dtype=torch.bool, device="cuda")
    rows = len(call["state_pool"])
    if checkpoints:
        zeros = torch.zeros(N, 2, dtype=torch.int64, device="cuda")
        call |= {"checkpoint_offsets": zeros, "checkpoint_indices": zeros - 1}
    run(call)
    graph, o = captured(call)
    for _ in range(20):
        changes = {name: torch.randn(call[name].shape, generator=generator) for name in TOKENS}
        slots = torch.randperm(2 * rows, generator=generator)[: 3 * N].view(N, 3) - rows // 2
        changes |= {"cu_seqlens": random_cu_seqlens(T, N, generator), "state_indices": slots[:, 0]}
        changes["has_initial_state"] = torch.rand(N, generator=generator) < 0.5
        changes["state_pool"] = torch.randn(call["state_pool"].shape, generator=generator)
        if checkpoints:
            changes["checkpoint_offsets"] = torch.randint(-1, 150, (N, 2), generator=generator)
            changes["checkpoint_indices"] = slots[:, 1:]
        for name, value in changes.items():
            call[name].copy_(value)
        for name in TOKENS:
            call[name][:, int(changes["cu_seqlens"][-1]) :] = torch.nan
        eager = cloned(call)
        graph.replay()
        assert same_bits(run(eager), o) and same_bits(eager["state_pool"], call["state_pool"])
        if not checkpoints:
            other = cloned({**eager, "state_pool": changes["state_pool"].to("cuda", pool_dtype)})
            assert same_bits(gathered(other), o) and same_bits(other["state_pool"], call["state_pool"])


def test_captured_segments_replay_with_other_slots() -> None:
    call = pool_call(T=512, B=2, H=1, HV=1)
    graph, o = captured(call)
    for seed in (1, 2, 3):
        new = pool_call(T=512, B=2, H=1, HV=1, seed=seed)
        new["state_indices"][seed % 2] = -1
        for name in (*TOKENS, "state_pool", "state_indices", "A_log", "dt_bias"):
            call[name].copy_(new[name])
        graph.replay()
        assert same_bits(run(new), o) and same_bits(new["state_pool"], call["state_pool"])


def test_the_op_is_sound_on_cuda_tensors() -> None:
    call = pool_call(T=40, B=3)
    call["state_pool"] = torch.randn_like(call["state_pool"])  # opcheck compares pools, and NaN with NaN is unequal
    torch.library.opcheck(torch.ops.flashkda.chunk_kda_paged.default, (), call)
