"""``batch_invariant=True``: the bits of a sequence do not depend on what it is computed beside."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from helpers import TOKENS, Call, make_call, paged, requiring_grad
from torch import Tensor

from flashkda_ops import chunk_kda, chunk_kda_paged

pytestmark = pytest.mark.usefixtures("threads")

LENGTHS = (33, 1, 0, 64, 70, 257, 5)
SPANS = list(itertools.pairwise(itertools.accumulate(LENGTHS, initial=0)))


@pytest.fixture(params=[1, 3], ids="threads={}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def packed_call(**options: object) -> Call:
    return make_call(
        sum(LENGTHS), cu_seqlens=[0, *(end for _, end in SPANS)], initial_state=True,
        **{"K": 48, "V": 40, **options},
    )  # fmt: skip


def alone(call: Call, n: int) -> Call:
    """Sequence ``n`` of a packed call as a dense batch of one."""
    start, end = SPANS[n]
    tokens = {name: call[name][:, start:end] for name in TOKENS}
    return {**call, **tokens, "cu_seqlens": None, "initial_state": call["initial_state"][n : n + 1]}


def run(call: Call) -> tuple[Tensor, Tensor]:
    o, state = chunk_kda(**call, output_final_state=True, batch_invariant=True)
    return o, state


@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
@pytest.mark.parametrize(("K", "V"), [(48, 40), (7, 5), (128, 128), (1, 1)])
def test_a_packed_sequence_has_the_bits_it_has_alone(gate: str, K: int, V: int) -> None:
    call = packed_call(gate=gate, K=K, V=V)
    o, state = run(call)
    for n, (start, end) in enumerate(SPANS):
        o_alone, state_alone = run(alone(call, n))
        assert torch.equal(o[:, start:end], o_alone), n
        assert torch.equal(state[n : n + 1], state_alone), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_and_padding_give_the_same_bits(dtype: torch.dtype) -> None:
    call = packed_call(dtype=dtype)
    o, state = run(call)
    order = [5, 2, 0, 6, 3, 1, 4]
    moved = {n: torch.cat([call[n][:, slice(*SPANS[i])] for i in order] + [call[n][:, :9]], 1) for n in TOKENS}
    ends = list(itertools.accumulate((LENGTHS[i] for i in order), initial=0))
    moved_o, moved_state = run(
        {**call, **moved, "cu_seqlens": torch.tensor(ends), "initial_state": call["initial_state"][order]}
    )
    assert torch.equal(moved_state, state[order])
    for i, start in zip(order, ends, strict=False):
        assert torch.equal(moved_o[:, start : start + LENGTHS[i]], o[:, slice(*SPANS[i])])


@pytest.mark.parametrize("B", [1, 2, 9])
def test_a_row_of_a_dense_batch_has_the_bits_it_has_alone(B: int) -> None:
    call = make_call(150, B=9, K=48, V=40, initial_state=True)
    first = {**call, **{n: call[n][:B] for n in (*TOKENS, "initial_state")}}
    last = {**call, **{n: call[n][B - 1 : B] for n in (*TOKENS, "initial_state")}}
    for batched, single in zip(run(first), run(last), strict=True):
        assert torch.equal(batched[B - 1 : B], single)


def test_gradients_have_the_same_bits_packed_and_alone() -> None:
    names = (*TOKENS, "initial_state")
    call = packed_call()
    packed = requiring_grad(call, names)
    sum(x.sum() for x in run(packed)).backward()
    for n, (start, end) in enumerate(SPANS):
        single = requiring_grad(alone(call, n), names)
        sum(x.sum() for x in run(single)).backward()
        for name in TOKENS:
            assert torch.equal(packed[name].grad[:, start:end], single[name].grad), (n, name)
        assert torch.equal(packed["initial_state"].grad[n : n + 1], single["initial_state"].grad), n


def test_prefill_into_a_pool_has_the_bits_it_has_alone() -> None:
    call = packed_call()
    N = len(LENGTHS)
    pool, slots = torch.randn(N + 2, *call["initial_state"].shape[1:]), torch.randperm(N + 2)[:N]
    batched = pool.clone()
    o = chunk_kda_paged(**paged(call, batched, slots, batch_invariant=True))
    for n, (start, end) in enumerate(SPANS):
        single = pool.clone()
        o_alone = chunk_kda_paged(**paged(alone(call, n), single, slots[n : n + 1], batch_invariant=True))
        assert torch.equal(o[:, start:end], o_alone), n
        assert torch.equal(batched[slots[n]], single[slots[n]]), n
