"""``torch.library.opcheck`` holds for every op: schema, fake implementation, autograd and functionalisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Call, make_call, paged, requiring_grad
from torch import Tensor

CHUNK: dict[str, dict[str, Any]] = {
    "dense": {"B": 3},
    "packed": {"cu_seqlens": [0, 2, 2, 5]},
    "states": {"B": 3, "initial_state": True},
    "packed states, V first": {"cu_seqlens": [0, 2, 2, 5], "initial_state": True, "state_v_first": True},
    "precomputed gate": {"B": 3, "gate": "precomputed", "beta": "raw", "l2norm": False},
    "unbounded gate": {"B": 3, "gate": "unbounded, no dt_bias"},
    "no A_log": {"B": 3, "gate": "bounded, no A_log"},
    "bf16": {"B": 3, "dtype": torch.bfloat16, "initial_state": True},
}


def chunk_call(options: dict[str, Any]) -> Call:
    return make_call(5, H=2, HV=4, K=6, V=3, **options)


def backward_call(options: dict[str, Any]) -> Call:
    call = chunk_call(options)
    o, state, _ = torch.ops.flashkda.chunk_kda(**call, output_final_state=True)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    defaults = {"use_gate_in_kernel": False, "state_v_first": False, "batch_invariant": False}
    optional = ("A_log", "dt_bias", "initial_state", "cu_seqlens", "scale", "lower_bound")
    return {
        "do": torch.randn_like(o), "dht": torch.randn_like(state), **dict.fromkeys(optional), **defaults, **call,
        "output_mask": [name in call for name in names],
    }  # fmt: skip


def transition_call(options: dict[str, Any]) -> Call:
    return {name: x for name, x in chunk_call(options).items() if name not in ("q", "initial_state")}


def paged_call(options: dict[str, Any], T: int = 5) -> Call:
    call = make_call(T, K=6, V=3, **{"B": 3, **options})
    shape = (4, 3, 6) if call.get("state_v_first") else (4, 6, 3)
    return paged(call, torch.randn(7, *shape), torch.tensor([5, -1, 2], dtype=torch.int32))


def permuted(x: Tensor) -> Tensor:
    """The same values in another dense layout: the first dimension innermost."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def check(op: Any, call: Call) -> None:
    torch.library.opcheck(op.default, (), call)


@pytest.mark.parametrize("options", CHUNK.values(), ids=CHUNK)
def test_chunk_kda_is_a_sound_op(options: dict[str, Any]) -> None:
    call = requiring_grad(chunk_call(options))
    check(torch.ops.flashkda.chunk_kda, call | {"output_final_state": True})


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_chunk_kda_with_intermediate_states_is_a_sound_op(layout: str) -> None:
    check(torch.ops.flashkda.chunk_kda, chunk_call(CHUNK[layout]) | {"checkpoint_interval": 32})


@pytest.mark.parametrize("options", CHUNK.values(), ids=CHUNK)
def test_chunk_kda_backward_is_a_sound_op(options: dict[str, Any]) -> None:
    check(torch.ops.flashkda.chunk_kda_backward, backward_call(options))


@pytest.mark.parametrize("options", CHUNK.values(), ids=CHUNK)
def test_chunk_kda_transition_is_a_sound_op(options: dict[str, Any]) -> None:
    check(torch.ops.flashkda.chunk_kda_transition, requiring_grad(transition_call(options)))


@pytest.mark.parametrize("absent", ["do", "dht"])
def test_chunk_kda_backward_with_one_cotangent_is_a_sound_op(absent: str) -> None:
    call = backward_call(CHUNK["states"])
    check(torch.ops.flashkda.chunk_kda_backward, call | {absent: None, "output_mask": [True, False] * 4})


@pytest.mark.parametrize(
    "options", [{}, {"state_v_first": True}, {"gate": "precomputed"}, {"B": 1, "cu_seqlens": [0, 2, 2, 5]}], ids=str
)
def test_the_paged_ops_are_sound(options: dict[str, Any]) -> None:
    call = paged_call(options)
    has = torch.tensor([True, True, False])
    check(torch.ops.flashkda.chunk_kda_paged, call | {"has_initial_state": has})
    check(torch.ops.flashkda.recurrent_kda_paged, call)


@pytest.mark.parametrize("options", [{"state_v_first": True}, {"B": 1, "cu_seqlens": [0, 2, 2, 5]}], ids=str)
def test_prefill_with_checkpoints_is_a_sound_op(options: dict[str, Any]) -> None:
    offsets, indices = torch.tensor([[1, 3], [2, 2], [4, 9]]), torch.tensor([[0, 1], [3, 9], [-1, 4]])
    checkpoints = {"checkpoint_offsets": offsets, "checkpoint_indices": indices}
    check(torch.ops.flashkda.chunk_kda_paged, paged_call(options) | checkpoints)


def test_speculative_decoding_is_a_sound_op() -> None:
    slots = {"state_indices": torch.tensor([[5, 6], [-1, 0], [2, 3]]), "num_accepted_tokens": torch.tensor([2, 1, 9])}
    check(torch.ops.flashkda.recurrent_kda_paged, paged_call({}, T=2) | slots)


CALLS = {
    "chunk_kda": chunk_call(CHUNK["states"]),
    "chunk_kda_backward": backward_call(CHUNK["states"]),
    "chunk_kda_paged": paged_call({}),
    "chunk_kda_transition": transition_call(CHUNK["states"]),
    "recurrent_kda_paged": paged_call({}),
}


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op, call in CALLS.items()
        for name, x in call.items()
        if isinstance(x, Tensor) and x.dim() > 1 and name != "state_pool"
    ],
)
def test_any_argument_may_have_a_permuted_dense_layout(op: str, name: str) -> None:
    call = {**CALLS[op], name: permuted(CALLS[op][name])}
    check(
        getattr(torch.ops.flashkda, op), requiring_grad(call) if op in ("chunk_kda", "chunk_kda_transition") else call
    )
