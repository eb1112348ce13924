"""``chunk_kda_transition``: the affine map of a sequence's tokens takes any state to where the recurrence takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BETAS, DIFFERENTIABLE, GATES, TOKENS, Call, error, make_call, reference, requiring_grad
from torch import Tensor

from flashkda_ops import cuda

LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"B": 2},
    "packed": {"cu_seqlens": [0, 3, 3, 37]},
    "packed, with padding": {"cu_seqlens": [0, 0, 20, 29]},
}


def transition(call: Call) -> tuple[Tensor, Tensor]:
    arguments = {name: x for name, x in call.items() if name not in ("q", "initial_state")}
    M, B = torch.ops.flashkda.chunk_kda_transition(**arguments)
    return M, B


def applied(call: Call) -> Tensor:
    """Final states by the map."""
    M, B = transition(call)
    S = call["initial_state"]
    return S @ M + B if call.get("state_v_first") else M @ S + B


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_the_map_gives_the_final_state_of_the_reference(gate: str, beta: str, layout: str, state_v_first: bool) -> None:
    call = make_call(37, gate=gate, beta=beta, initial_state=True, state_v_first=state_v_first, **LAYOUTS[layout])
    assert error(applied(call), reference(call)[1], heads=1) < 1e-6
    call = make_call(
        37,
        gate=gate,
        beta=beta,
        initial_state=True,
        state_v_first=state_v_first,
        dtype=torch.float64,
        **LAYOUTS[layout],
    )
    assert error(applied(call), reference(call)[1], heads=1) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_fp32_for_16_bit_tokens(dtype: torch.dtype) -> None:
    call = make_call(100, initial_state=True, dtype=dtype)
    M, B = transition(call)
    assert M.dtype == B.dtype == torch.float32
    assert error(applied(call), reference(call)[1], heads=1) < 1e-5


def test_autocast_casts_keys_and_values_alone() -> None:
    call = make_call(37)
    with torch.autocast("cpu", torch.bfloat16):
        maps = transition(call)
    halves = {name: call[name].bfloat16() for name in ("k", "v")}
    assert all(torch.equal(x, y) for x, y in zip(maps, transition(call | halves), strict=True))


@pytest.mark.parametrize(
    "options",
    [{"H": 1, "HV": 3, "K": 5, "V": 48}, {"K": 1, "V": 1}, {"T": 64}, {"T": 200, "H": 8, "HV": 8, "K": 128, "V": 4}],
    ids=str,
)
def test_it_follows_every_shape(options: dict[str, Any]) -> None:
    call = make_call(**{"T": 37, "initial_state": True, "dtype": torch.float64, **options})
    assert error(applied(call), reference(call)[1], heads=1) < 1e-13


def test_maps_of_parts_compose() -> None:
    call = make_call(70, dtype=torch.float64, state_v_first=True)
    (M, B), *parts = (
        transition({**call, **{name: call[name][:, a:b] for name in TOKENS}}) for a, b in ((0, 70), (0, 41), (41, 70))
    )
    (M1, B1), (M2, B2) = parts
    assert error(M1 @ M2, M) < 1e-13
    assert error(B1 @ M2 + B2, B) < 1e-13


@pytest.mark.gpu
@pytest.mark.parametrize("slow_heads", [0, 2, 4])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize(
    "layout",
    [{}, {"B": 3}, {"dtype": torch.float16}, {"cu_seqlens": [0, 3, 3, 170, 290]}, {"gate": "unbounded"}],
    ids=str,
)
def test_the_kernel_gives_the_map(layout: dict[str, Any], state_v_first: bool, slow_heads: int) -> None:
    call = make_call(
        300, K=128, V=128, initial_state=True, state_v_first=state_v_first, slow_heads=slow_heads, device="cuda",
        **{"dtype": torch.bfloat16, **layout},
    )  # fmt: skip
    assert cuda.chunk_kda_reason(*(call.get(name) for name in (*DIFFERENTIABLE, "cu_seqlens"))) is None
    assert error(applied(call), reference(call)[1], heads=1) < 2e-2
    M, B = transition(call)
    assert M.dtype == B.dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip((M, B), transition(call), strict=True))
    exact_M, exact_B = transition({**call, **{name: call[name].float() for name in TOKENS}})
    assert error(B, exact_B, heads=1) < 2e-2
    assert (M - exact_M).norm() < 2e-2 * (exact_M.norm() + 1e-3)  # of fast heads alone it is zero


@pytest.mark.parametrize("layout", [{"B": 2}, {"cu_seqlens": [0, 0, 0]}], ids=str)
def test_no_tokens_are_the_identity(layout: dict[str, Any]) -> None:
    M, B = transition(make_call(0, **layout))
    assert torch.equal(M, torch.eye(16).expand(2, 4, 16, 16))
    assert B.shape == (2, 4, 16, 8) and not B.any()


def test_padding_is_not_read() -> None:
    call = make_call(40, cu_seqlens=[0, 5, 5, 30])
    expected = transition(call)
    for name in TOKENS:
        call[name][:, 30:] = torch.nan
    assert all(torch.equal(x, y) for x, y in zip(transition(call), expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_reference(gate: str, layout: str) -> None:
    call = make_call(37, gate=gate, initial_state=True, dtype=torch.float64, **LAYOUTS[layout])
    grads = []
    for final_state in (applied, lambda leaves: reference(leaves)[1]):
        leaves = requiring_grad(call)
        S = final_state(leaves)
        S.backward(torch.linspace(-1, 1, S.numel(), dtype=S.dtype).view(S.shape))
        grads.append({name: leaves[name].grad for name in DIFFERENTIABLE if name in leaves and name != "q"})
    for name, x in grads[0].items():
        assert error(x, grads[1][name]) < 1e-11, name


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck_passes_from_both_outputs(gate: str, state_v_first: bool) -> None:
    call = make_call(5, gate=gate, K=3, V=2, dtype=torch.float64, state_v_first=state_v_first)
    names = [name for name in DIFFERENTIABLE if name in call and name != "q"]

    def of_leaves(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return transition({**call, **dict(zip(names, tensors, strict=True))})

    leaves = requiring_grad(call)
    assert torch.autograd.gradcheck(of_leaves, [leaves[name] for name in names], fast_mode=True)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"k": torch.zeros(2, 5, 16)}, "k must have 4 dimensions [B, T, heads, head dim], got shape [2, 5, 16]"),
        ({"k": torch.zeros(2, 5, 0, 16)}, "k must have at least one head, got 0"),
        ({"k": torch.zeros(2, 5, 3, 16)}, "v must have a multiple of the heads of k, got 4 value heads for 3"),
        ({"v": torch.zeros(2, 5, 4, 8).half()}, "v must be float32 where k is float32, got float16"),
        ({"g": torch.zeros(2, 5, 4, 15)}, "g must have shape [B, T, HV, K] = [2, 5, 4, 16], got [2, 5, 4, 15]"),
        ({"beta": torch.zeros(2, 5, 4, device="meta")}, "beta must be on cpu as k is, got meta"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "k must have a batch size of 1 with cu_seqlens"),
        ({"lower_bound": -9.0}, "lower_bound must be in [-5, 0), got -9.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_names_the_argument(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as raised:
        transition({**make_call(5, B=2), **changes})
    assert str(raised.value).startswith(text)


def test_a_checked_call_rejects_a_malformed_cu_seqlens() -> None:
    with pytest.raises(ValueError, match="cu_seqlens must end at or before T = 5, got 9"):
        transition({**make_call(5, cu_seqlens=[0, 9]), "validate": True})
