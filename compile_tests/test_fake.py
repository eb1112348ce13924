"""Fake CUDA tensors without a GPU and meta tensors: what the fake implementations promise is what the ops return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DIFFERENTIABLE, Call, make_call, paged, requiring_grad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flashkda_ops import chunk_kda

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
