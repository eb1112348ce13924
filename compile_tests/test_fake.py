"""Fake CUDA tensors without a GPU and meta tensors: what the fake implementations promise is what the ops return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DIFFERENTIABLE, TOKENS, Call, make_call, paged, requiring_grad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flashkda_ops import chunk_kda, recurrent_kda
from flashkda_ops.integrations import flash_kda

LAYOUTS: dict[str, dict[str, Any]] = {"dense": {"B": 3}, "packed": {"cu_seqlens": [0, 2, 2, 5]}}
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def calls(layout: str, dtype: torch.dtype, state_v_first: bool) -> dict[str, Call]:
    """One call of every op."""
    options = {**LAYOUTS[layout], "dtype": dtype, "state_v_first": state_v_first, "initial_state": True}
    call = {"state_v_first": state_v_first, **make_call(5, K=6, V=3, **options)}
    q, v, state = call["q"], call["v"], call["initial_state"]
    pool = torch.zeros(7, *state.shape[1:], dtype=state.dtype)
    on_pool = paged(call, pool, torch.tensor([1, 0, -1]))
    transition = {name: x for name, x in call.items() if name not in ("q", "initial_state")}
    backward = {"cu_seqlens": None, "scale": None, **call, "batch_invariant": False}
    return {
        "chunk_kda": {**call, "output_final_state": True, "checkpoint_interval": 32},
        "chunk_kda_backward": {
            "do": torch.zeros_like(v), "dht": torch.zeros_like(state), **backward, "output_mask": [True, False] * 4,
        },
        "chunk_kda_transition": transition,
        "chunk_kda_paged": {**on_pool, "q": q.transpose(1, 2).contiguous().transpose(1, 2)},
        "recurrent_kda_paged": on_pool,
    }  # fmt: skip


def like(call: Call, device: str) -> Call:
    """The call with empty tensors of the same layouts; fake ones under a ``FakeTensorMode``."""
    return tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device), call)


def described(outputs: Any, device: str) -> list[Any]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(x.device.type == device for x in outputs)
    return [(strides_that_matter(x), tuple(x.shape), x.dtype) for x in outputs]


def strides_that_matter(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["chunk_kda", "chunk_kda_backward", "chunk_kda_transition", "chunk_kda_paged", "recurrent_kda_paged"]
)
def test_fake_cuda_and_meta_tensors_describe_the_real_outputs(
    name: str, layout: str, dtype: torch.dtype, state_v_first: bool
) -> None:
    op, call = getattr(torch.ops.flashkda, name), calls(layout, dtype, state_v_first)[name]
    on_meta = like(call, "meta")
    with FakeTensorMode() as mode:
        on_cuda = like(call, "cuda")
        assert all(x.fake_mode is mode for x in on_cuda.values() if isinstance(x, Tensor))
        fake = described(op(**on_cuda), "cuda")
    assert fake == described(op(**on_meta), "meta") == described(op(**call), "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_step_runs_on_meta_tensors(layout: str) -> None:
    call = make_call(5, initial_state=True, **LAYOUTS[layout])
    leaves = requiring_grad(like(call, "meta"))
    o, state = chunk_kda(**leaves, output_final_state=True)
    (o.sum() + state.sum()).backward()
    assert all(leaves[name].grad.shape == call[name].shape for name in DIFFERENTIABLE)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes of 0
# ---------------------------------------------------------------------------------------------------------------------

EMPTY: dict[str, dict[str, Any]] = {
    "no tokens": {"T": 0, "B": 3},
    "one row of no tokens": {"T": 0, "B": 1},
    "no batch": {"T": 5, "B": 0},
    "no batch, no tokens": {"T": 0, "B": 0},
    "packed, no tokens": {"T": 0, "cu_seqlens": [0, 0, 0]},
    "packed, one sequence of no tokens": {"T": 0, "cu_seqlens": [0, 0]},
    "packed, all sequences empty": {"T": 5, "cu_seqlens": [0, 0, 0]},
    "packed, bounds behind the tokens": {"T": 0, "cu_seqlens": [3, 7, 9]},
}


def empty_call(size: str, **options: Any) -> Call:
    return make_call(K=6, V=3, initial_state=True, **EMPTY[size], **options)


def empty_calls(size: str, **options: Any) -> dict[str, tuple[str, Call]]:
    """Every op with every kind of option, by name: the op and its call."""
    call = {"state_v_first": False, **empty_call(size, **options)}
    stateless = {name: x for name, x in call.items() if name != "initial_state"}
    v, state = call["v"], call["initial_state"]
    N = state.shape[0]
    pool, rows = torch.zeros(N, *state.shape[1:], dtype=state.dtype), torch.arange(N)
    on_pool = paged(call, pool, rows)
    checkpoints = {"checkpoint_offsets": torch.ones(N, 2).long(), "checkpoint_indices": torch.full((N, 2), -1)}
    transition = {name: x for name, x in stateless.items() if name != "q"}
    grads = {"do": torch.ones_like(v), "dht": torch.ones_like(state), "cu_seqlens": None, "scale": None, **call}
    grads |= {"batch_invariant": False}
    forward = {"state": {"output_final_state": True}, "no state": {}}
    forward |= {f"interval {i}": {"output_final_state": True, "checkpoint_interval": i} for i in (16, 32, 64)}
    forward |= {"batch invariant": {"output_final_state": True, "batch_invariant": True}, "checked": {"validate": True}}
    if size == "packed, bounds behind the tokens":
        del forward["checked"]
    return {
        **{f"chunk_kda, {name}": ("chunk_kda", {**call, **extra}) for name, extra in forward.items()},
        "chunk_kda, stateless": ("chunk_kda", {**stateless, "output_final_state": True, "checkpoint_interval": 32}),
        "backward": ("chunk_kda_backward", {**grads, "output_mask": [True] * 8}),
        "backward, of o": ("chunk_kda_backward", {**grads, "dht": None, "output_mask": [True] * 8}),
        "backward, of the state": ("chunk_kda_backward", {**grads, "do": None, "output_mask": [True] * 8}),
        "backward, to the state": ("chunk_kda_backward", {**grads, "output_mask": [False] * 7 + [True]}),
        "transition": ("chunk_kda_transition", transition),
        "prefill": ("chunk_kda_paged", on_pool),
        "prefill, checkpoints": ("chunk_kda_paged", {**on_pool, **checkpoints}),
        "prefill, no rows": ("chunk_kda_paged", {**on_pool, "state_pool": pool[:0]}),
        "prefill, no rows, checkpoints": ("chunk_kda_paged", {**on_pool, **checkpoints, "state_pool": pool[:0]}),
        "decode": ("recurrent_kda_paged", on_pool),
        "decode, no rows": ("recurrent_kda_paged", {**on_pool, "state_pool": pool[:0]}),
        "decode, a slot a token": ("recurrent_kda_paged", {**on_pool, "state_indices": rows[:, None].expand(N, 5)}),
    }  # fmt: skip


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", EMPTY)
def test_calls_of_nothing_are_described_by_fake_and_meta_tensors(
    size: str, dtype: torch.dtype, state_v_first: bool
) -> None:
    for name, (op_name, call) in empty_calls(size, dtype=dtype, state_v_first=state_v_first).items():
        op = getattr(torch.ops.flashkda, op_name)
        real = described(op(**call), "cpu")
        on_meta = like(call, "meta") | {"validate": False} if "validate" in call else like(call, "meta")
        assert described(op(**on_meta), "meta") == real, name
        with FakeTensorMode():
            assert described(op(**like(call, "cuda")), "cuda") == real, name


@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("size", EMPTY)
def test_calls_of_nothing_pass_states_through_and_have_gradients_of_zero(
    size: str, state_v_first: bool, gate: str
) -> None:
    call = empty_call(size, state_v_first=state_v_first, gate=gate)
    for function, options in (
        (chunk_kda, {}),
        (chunk_kda, {"batch_invariant": True}),
        (torch.ops.flashkda.chunk_kda, {}),
        (torch.ops.flashkda.chunk_kda, {"checkpoint_interval": 32}),
    ):
        leaves = requiring_grad(call)
        o, state, *_ = function(**leaves, output_final_state=True, **options)
        assert o.shape == call["v"].shape and not o.any()
        assert torch.equal(state, call["initial_state"])
        cotangent = torch.randn(state.shape)
        torch.autograd.backward([o, state], [torch.ones_like(o), cotangent])
        assert torch.equal(leaves["initial_state"].grad, cotangent)
        for name in (*TOKENS, "A_log", "dt_bias"):
            if name in call:
                grad = leaves[name].grad
                assert grad.shape == call[name].shape and grad.dtype == call[name].dtype and not grad.any(), name
    o, state = recurrent_kda(**call, output_final_state=True)
    assert o.shape == call["v"].shape and torch.equal(state, call["initial_state"])
    with torch.no_grad():
        o, state, states = chunk_kda(**call, output_final_state=True, return_intermediate_states=True)
        assert torch.equal(state, call["initial_state"]) and not states.any()


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("size", EMPTY)
def test_the_map_of_no_tokens_is_the_identity(size: str, state_v_first: bool) -> None:
    call = empty_call(size, state_v_first=state_v_first)
    leaves = requiring_grad({name: x for name, x in call.items() if name not in ("q", "initial_state")})
    M, B = torch.ops.flashkda.chunk_kda_transition(**leaves)
    assert torch.equal(M, torch.eye(6).expand_as(M)) and B.shape == call["initial_state"].shape and not B.any()
    (M.sum() + B.sum()).backward()
    assert all(not leaves[name].grad.any() for name in DIFFERENTIABLE if name in leaves)


@pytest.mark.parametrize("size", EMPTY)
def test_pools_are_left_as_they_are_by_calls_of_nothing(size: str) -> None:
    for name, (op_name, call) in empty_calls(size).items():
        if "state_pool" in call:
            pool = torch.randn_like(call["state_pool"])
            before = pool.clone()
            o = getattr(torch.ops.flashkda, op_name)(**{**call, "state_pool": pool})
            assert torch.equal(pool, before) and o.shape == call["v"].shape and not o.any(), name


@pytest.mark.parametrize("size", EMPTY)
def test_flash_kda_takes_calls_of_nothing(size: str) -> None:
    call = empty_call(size, state_v_first=True)
    tokens = {name: call[name] for name in (*TOKENS, "A_log", "dt_bias", "lower_bound", "initial_state")}
    out, final = torch.full_like(call["v"], torch.nan), torch.full_like(call["initial_state"], torch.nan)
    flash_kda.fwd(**tokens, scale=1.0, out=out, final_state=final, cu_seqlens=call.get("cu_seqlens"))
    assert not out.any() and torch.equal(final, call["initial_state"])
